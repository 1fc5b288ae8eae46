"""The noise that denoisers were trained with is recorded: no scheduler that a pipeline is given later changes it."""

import json

import pytest
import torch
from conftest import randomised
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from exact_denoisers import scheduler_classes
from small_pipelines import DIT, make_vae

from diffusers_dmp import ClassConditionalPipeline, DiTModel, SNRSplitPipeline
from diffusers_dmp.diffusion.noise_schedules import noise_schedule_of, scheduler_of_training

COSINE = "squaredcos_cap_v2"


def make(scheduler, kind: str = "one"):
    denoisers = [randomised(DiTModel(**DIT), seed) for seed in range(1 if kind == "one" else 2)]
    pipeline = (
        ClassConditionalPipeline(denoisers[0], scheduler)
        if kind == "one"
        else SNRSplitPipeline(denoisers, scheduler, [0.5])
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=4, output_type="latent", generator=generator).images


def without_record(folder) -> None:
    """Make a folder one that an earlier version saved."""
    index = json.loads((folder / "model_index.json").read_text())
    del index["noise_schedule"]
    (folder / "model_index.json").write_text(json.dumps(index))


OTHER = {
    "other defaults": (DDPMScheduler(), lambda config: HeunDiscreteScheduler.from_config(config)),
    "a cosine schedule": (DDPMScheduler(beta_schedule=COSINE), lambda config: EulerDiscreteScheduler()),
    "another prediction": (DDIMScheduler(prediction_type="v_prediction"), lambda config: EulerDiscreteScheduler()),
}


@pytest.mark.parametrize("kind", ["one", "split"])
@pytest.mark.parametrize("case", OTHER)
def test_saving_and_sharing_change_no_image(case, kind, tmp_path):
    trained, other = OTHER[case]
    pipeline = make(trained, kind)
    own = pipeline.scheduler = other(trained.config)
    expected = sample(pipeline)
    torch.testing.assert_close(sample(type(pipeline).from_pipe(pipeline)), expected, rtol=0, atol=0)
    pipeline.save_pretrained(tmp_path)
    assert pipeline.scheduler is own
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is type(own)
    torch.testing.assert_close(loaded.scheduler.alphas_cumprod, trained.alphas_cumprod, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(sample(loaded), expected)


@pytest.mark.parametrize("called_on", [DiffusionPipeline, None])
@pytest.mark.parametrize("kind", ["one", "split"])
def test_a_scheduler_that_is_given_at_loading(kind, called_on, tmp_path):
    pipeline = make(DDPMScheduler(beta_schedule=COSINE, prediction_type="v_prediction"), kind)
    pipeline.save_pretrained(tmp_path)
    cls = called_on or type(pipeline)
    own = cls.from_pretrained(tmp_path, scheduler=EulerDiscreteScheduler())  # converts, with the betas of training
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    torch.testing.assert_close(sample(own), sample(pipeline))
    for scheduler, message in (
        (FlowMatchEulerDiscreteScheduler(), "only one of them is a flow-matching one"),
        (
            DDPMScheduler(beta_schedule="linear"),
            "noise schedule .* but got a DDPMScheduler with beta_schedule='linear'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(tmp_path, scheduler=scheduler)
    made = cls.from_pretrained(tmp_path, scheduler=DDPMScheduler(beta_schedule="linear"), noise_schedule=None)
    assert made.config.noise_schedule["beta_schedule"] == "linear"


def test_folders_without_a_record(tmp_path):
    """Those of earlier versions, and of Diffusers' own pipelines: the folder's scheduler says what the given one must fit."""
    make(DDPMScheduler(beta_schedule=COSINE)).save_pretrained(tmp_path / "own")
    without_record(tmp_path / "own")
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8
    )
    DiTPipeline(stock, make_vae(), DDIMScheduler(beta_schedule=COSINE)).save_pretrained(tmp_path / "stock")
    for folder in ("own", "stock"):
        loaded = ClassConditionalPipeline.from_pretrained(tmp_path / folder, scheduler=EulerDiscreteScheduler())
        assert loaded.config.noise_schedule["beta_schedule"] == COSINE
        with pytest.raises(ValueError, match="only one of them is a flow-matching one"):
            ClassConditionalPipeline.from_pretrained(tmp_path / folder, scheduler=FlowMatchEulerDiscreteScheduler())


def test_joined_pipelines():
    """`from_pipelines` compares and takes what the denoisers were trained with, not what the schedulers say."""
    parts = [make(DDPMScheduler(prediction_type="v_prediction")) for _ in range(2)]
    parts[0].scheduler = HeunDiscreteScheduler.from_config(DDPMScheduler().config)
    joined = SNRSplitPipeline.from_pipelines(parts, [0.5])
    assert joined.config.prediction_types == ["v_prediction"] * 2
    assert joined.intervals().edges == SNRSplitPipeline.from_pipelines(parts[::-1], [0.5]).intervals().edges
    parts[1] = make(DDPMScheduler(beta_schedule=COSINE))
    with pytest.raises(ValueError, match="one noise schedule, .* HeunDiscreteScheduler and DDPMScheduler"):
        SNRSplitPipeline.from_pipelines(parts, [0.5])


SETTINGS = [
    {},
    {"beta_schedule": COSINE, "prediction_type": "v_prediction"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    {"beta_schedule": "exp"},
    {"trained_betas": torch.linspace(1e-4, 0.03, 500).tolist(), "num_train_timesteps": 500},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_record_gives_the_noise_levels_of_every_scheduler(settings):
    """As JSON, too. Without a record only where the noise levels are not those of betas."""
    recorded = set()
    for name, scheduler_class in scheduler_classes().items():
        try:
            scheduler = scheduler_class(**settings)
        except (TypeError, ValueError, NotImplementedError):
            continue
        record = json.loads(json.dumps(noise_schedule_of(scheduler)))
        if record is not None and record["process"] == "diffusion":
            levels = scheduler_of_training(record).alphas_cumprod
            torch.testing.assert_close(levels, scheduler.alphas_cumprod.float(), rtol=1e-3, atol=1e-6)
            assert record["prediction_type"] == (scheduler.config.get("prediction_type") or "flow_prediction")
            recorded.add(name)
    assert len(recorded) >= (1 if settings == {"beta_schedule": "exp"} else 6)


@pytest.mark.parametrize(
    "noise_schedule",
    ["linear", {}, {"process": "diffusion"}, {"process": "diffusion", "prediction_type": "epsilon", "beta": 1},
     {"process": "diffusion", "prediction_type": "epsilon", "beta_schedule": "quadratic"}],
    ids=str,
)  # fmt: skip
def test_refuses_what_is_no_record(noise_schedule):
    with pytest.raises(ValueError, match="Expected `noise_schedule` to"):
        ClassConditionalPipeline(DiTModel(**DIT), PNDMScheduler(), noise_schedule=noise_schedule)
