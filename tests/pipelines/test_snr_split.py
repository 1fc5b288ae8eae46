"""Several denoisers in turn, each for its own interval of signal-to-noise ratios."""

import subprocess
import sys

import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from test_class_conditional import SCHEDULERS

from diffusers_dmp import (
    ClassConditionalPipeline,
    DiTModel,
    DTRTransformer2DModel,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
    respaced_timesteps,
)
from diffusers_dmp.diffusion.noise import alpha_sigma
from diffusers_dmp.diffusion.predictions import PREDICTION_TYPES, convert_prediction
from diffusers_dmp.pipelines.denoiser_inputs import DenoiserInputs, reads_inputs_on_cpu
from diffusers_dmp.pipelines.scheduling import owners_of_steps
from diffusers_dmp.training.objectives.ddpm import VARIANCE_TYPES

UNET = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "model_channels": 32,
    "channel_multipliers": (1,),
    "layers_per_block": 1,
    "attention_levels": (),
    "attention_head_dim": 16,
    "num_classes": 10,
}


class Toy(ModelMixin, ConfigMixin):
    """The denoiser of the published trajectories, x̂0 = 0.9·tanh(factor·x_t), with any prediction type."""

    variance_type = "learned_range_sigmoid"

    @register_to_config
    def __init__(self, factor: float, prediction_type: str = "sample", in_channels: int = 3, sample_size: int = 8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(factor))
        self.calls = []

    def forward(self, sample, timestep):
        self.calls.append(timestep[0].item())
        x0 = 0.9 * torch.tanh(self.weight * sample)
        alphas_cumprod = DDIMScheduler().alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        alpha, sigma = alpha_sigma(alphas_cumprod)
        kind = self.config["prediction_type"]
        return UNet2DOutput(sample=convert_prediction(x0, sample, alpha, sigma, "sample", kind))


def quiet(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: DiffusionPipeline, **kwargs) -> torch.Tensor:
    defaults = {"num_inference_steps": 6, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipeline([1, 2], **defaults | kwargs).images


@pytest.fixture
def mixed() -> SNRSplitPipeline:
    """A patch-2 UNet that predicts x0 for the noise, a DTR DiT that predicts ε for the rest."""
    dit = randomised(DTRTransformer2DModel(**TINY_CONFIG | {"out_channels": 4}))
    unet = randomised(PatchedUNet2DModel(**UNET))
    return quiet(SNRSplitPipeline([dit, unet], DDIMScheduler(), [0.25]))


# Which denoiser makes which step


@pytest.mark.parametrize("boundaries", [[0.25], [2.0, 0.25], [4.0, 1.0, 0.05]])
def test_published_splits(boundaries):
    vectors = Vectors("diffusion")
    name = {1: "0.25", 2: "2.0,0.25", 3: "4,1,0.05"}[len(boundaries)]
    pipeline = SNRSplitPipeline([Toy(1.0) for _ in range(len(boundaries) + 1)], DDIMScheduler(), boundaries)
    assert torch.equal(pipeline.intervals().index(torch.arange(1000)), vectors[f"snr_split.{name}.expert"].long())


@pytest.mark.parametrize(
    ("boundaries", "factors", "steps"), [([0.25], [1.3, 0.7], 25), ([2.0, 0.25], [1.5, 1.0, 0.6], 10)]
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_published_trajectories(boundaries, factors, steps, prediction_type):
    """Deterministic DDIM, which is the solver of first order, through denoisers that predict different things."""
    vectors, name = Vectors("diffusion"), f"{','.join(map(str, boundaries))}.steps{steps}"
    denoisers = [Toy(factor, prediction_type if index else "sample") for index, factor in enumerate(factors)]
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, solver_order=1,
        prediction_type="sample", final_sigmas_type="zero",
    )  # fmt: skip
    pipeline = quiet(SNRSplitPipeline(denoisers, scheduler, boundaries))
    noise = vectors[f"traj.snr_split.ddim.{name}.noise"]
    timesteps = respaced_timesteps(1000, steps)
    images = pipeline(batch_size=2, latents=noise, timesteps=timesteps, output_type="latent").images
    assert_matches(images, vectors[f"traj.snr_split.ddim.{name}.sample"])


@pytest.mark.parametrize("denoiser_class", [DTRTransformer2DModel, PatchedUNet2DModel])
def test_one_denoiser_without_a_boundary_is_the_plain_pipeline(denoiser_class, tiny_dtr):
    """Also if it predicts something else than the scheduler expects."""
    denoiser = (
        tiny_dtr
        if denoiser_class is DTRTransformer2DModel
        else randomised(PatchedUNet2DModel(**UNET | {"out_channels": 8}))
    )
    for scheduler in (DDPMScheduler(variance_type="learned_range"), DDIMScheduler()):
        plain = quiet(ClassConditionalPipeline(denoiser, scheduler))
        split = quiet(SNRSplitPipeline([denoiser], scheduler, [], guidance_scales=[1.5]))
        torch.testing.assert_close(generate(split), generate(plain, guidance_scale=1.5))
        torch.testing.assert_close(generate(split, guidance_scale=1.0), generate(plain))


def test_denoisers_of_several_dtypes(mixed):
    images = generate(mixed)
    mixed.denoiser_1.to(torch.bfloat16)
    torch.testing.assert_close(generate(mixed), images, atol=0.1, rtol=0.1)


def test_a_sample_does_not_depend_on_its_batch(mixed):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = mixed([1, 2], guidance_scale=[1.5, 1.0], num_inference_steps=4, generator=generators, output_type="pt")
    for index, label in enumerate((1, 2)):
        generator = torch.Generator().manual_seed(index + 1)
        alone = mixed([label], guidance_scale=[1.5, 1.0], num_inference_steps=4, generator=generator, output_type="pt")
        torch.testing.assert_close(alone.images[0], together.images[index], atol=1e-4, rtol=1e-3)


def test_boundaries_of_one_call(mixed):
    assert mixed.steps_per_denoiser(10) == [4, 6]
    assert mixed.steps_per_denoiser(10, snr_boundaries=[4.0]) == [2, 8]
    usual = generate(mixed)
    assert (generate(mixed, snr_boundaries=[4.0]) - usual).abs().max() > 1e-3
    assert torch.equal(generate(mixed), usual)  # the same computation again


def test_guidance_of_each_denoiser(mixed):
    def batch_sizes(**kwargs) -> list[set[int]]:
        seen = [set() for _ in mixed.denoisers]
        handles = [
            denoiser.register_forward_pre_hook(lambda model, args, sizes=sizes: sizes.add(len(args[0])))
            for denoiser, sizes in zip(mixed.denoisers, seen)
        ]
        generate(mixed, **kwargs)
        for handle in handles:
            handle.remove()
        return seen

    assert batch_sizes() == [{2}, {2}]
    assert batch_sizes(guidance_scale=[1.0, 1.5]) == [{2}, {4}]
    assert batch_sizes(guidance_scale=1.5) == [{4}, {4}]


def test_warns_of_a_denoiser_without_steps(mixed):
    with pytest.warns(UserWarning, match="Denoiser 1 has none of the 1 steps"):
        generate(mixed, num_inference_steps=1)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_every_scheduler(scheduler_class):
    """Both denoisers are called, that for much noise first, and it is not called again after the other."""
    flow = "FlowMatch" in scheduler_class.__name__
    scheduler = scheduler_class() if flow else scheduler_class(prediction_type="epsilon")
    unets = [randomised(UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32,), norm_num_groups=8,
                                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)))
             for _ in range(2)]  # fmt: skip
    order = []
    for index, unet in enumerate(unets):
        unet.register_forward_pre_hook(lambda model, args, index=index: order.append(index))
    pipeline = quiet(SNRSplitPipeline(unets, scheduler, [0.5]))
    steps = 20 if scheduler_class is LCMScheduler else 7
    images = pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.isfinite().all()
    assert order == sorted(order, reverse=True) and set(order) == {0, 1}


def test_one_denoiser_makes_both_evaluations_of_a_second_order_step():
    scheduler = HeunDiscreteScheduler(beta_schedule="linear", prediction_type="sample")
    denoisers = [Toy(1.3), Toy(0.7)]
    pipeline = quiet(SNRSplitPipeline(denoisers, scheduler, [0.25]))
    pipeline(num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    # the step from t = 555 begins below an SNR of 0.25: its second evaluation, at 444, is made by the same denoiser
    noisy, clean = denoisers[1].calls, denoisers[0].calls
    assert len(noisy) % 2 == 0 and noisy[-1] == clean[0] or noisy[-1] < 396 <= noisy[-2]
    assert len(noisy) + len(clean) == 19


def test_one_denoiser_makes_the_four_evaluations_of_a_runge_kutta_step():
    scheduler = PNDMScheduler(prediction_type="epsilon")
    pipeline = SNRSplitPipeline([Toy(1.3, "epsilon"), Toy(0.7, "epsilon")], scheduler, [0.0005])
    scheduler.set_timesteps(10)
    owners = owners_of_steps(scheduler, pipeline.intervals())
    assert owners[:4] == [1] * 4 and owners[4:] == [0] * (len(owners) - 4)
    assert scheduler.timesteps[:5].tolist() == [900, 850, 850, 800, 800]
    assert pipeline.intervals().index(scheduler.timesteps[:4]).tolist() == [1, 0, 0, 0]  # without this rule


def test_denoisers_that_read_their_timesteps_get_them_on_the_cpu(mixed):
    remix = randomised(RemixDiTModel(**TINY_CONFIG | {"out_channels": 4}))
    pipeline = quiet(SNRSplitPipeline([remix, mixed.denoiser_1], DDIMScheduler(), [0.25]))
    seen = []
    remix.register_forward_pre_hook(lambda model, args: seen.append(args[1].device.type))
    generate(pipeline)
    assert seen == ["cpu"] * len(seen) and reads_inputs_on_cpu(remix)
    assert reads_inputs_on_cpu(mixed.denoiser_0) and not reads_inputs_on_cpu(mixed.denoiser_1)  # a DTR
    plain = randomised(DiTModel(**TINY_CONFIG | {"out_channels": 4}))
    assert not reads_inputs_on_cpu(plain)
    PromptPatch.for_transformer(plain).attach(plain)
    assert reads_inputs_on_cpu(plain)


# What they predict


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
@pytest.mark.parametrize("use_karras_sigmas", [False, True])
def test_converted_predictions_generate_the_same(scheduler_class, use_karras_sigmas):
    """For a scheduler that expects x0 and one that expects ε, also if its noise levels lie between its integer timesteps."""
    unet = randomised(PatchedUNet2DModel(**UNET))
    images = [
        generate(
            quiet(
                SNRSplitPipeline(
                    [unet], scheduler_class(prediction_type=kind, use_karras_sigmas=use_karras_sigmas), []
                )
            )
        )
        for kind in ("sample", "epsilon")
    ]
    torch.testing.assert_close(images[1], images[0], atol=2e-5, rtol=1e-4)


def test_conversion_at_pure_noise():
    """ᾱ = 0 at the first step."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    unets = [randomised(PatchedUNet2DModel(**UNET), seed) for seed in (0, 1)]
    assert generate(quiet(SNRSplitPipeline(unets, scheduler, [0.25]))).isfinite().all()


def test_both_meanings_of_a_learned_variance():
    """The variance means the same after it is converted: f = 1 - u in Patch Diffusion, f = (v + 1)/2 in Diffusers."""
    unet = randomised(PatchedUNet2DModel(**UNET | {"out_channels": 8}))
    pipeline = quiet(ClassConditionalPipeline(unet, DDPMScheduler(variance_type="learned_range")))
    x_t, timestep = torch.randn(1, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        u = unet(x_t, timestep).sample[:, 4:]
        inputs = DenoiserInputs(unet, timestep[None], x_t.device, [0])
        v = inputs.predict(0, x_t, None, True)[:, 4:]
    expected = VARIANCE_TYPES["learned_range_sigmoid"](u)
    torch.testing.assert_close(VARIANCE_TYPES["learned_range"](v), expected)
    assert generate(pipeline).isfinite().all()


class Recorded(Toy):
    """Predicts what the published model predicted."""

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.recorded)


@pytest.mark.parametrize(("row", "timestep"), [(0, 400), (1, 10)])
def test_ancestral_steps_have_the_published_mean_and_variance(row, timestep):
    vectors = Vectors("diffusion")
    x, recorded, mean, log_variance = (
        vectors[f"ddpm.patch.{name}"][row : row + 1] for name in ("x", "model_output", "mean", "log_variance")
    )
    denoiser, samples = Recorded(1.0), []
    denoiser.recorded = recorded
    denoiser.register_to_config(out_channels=6)
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="sample")
    pipeline = quiet(SNRSplitPipeline([denoiser], scheduler, []))
    pipeline(
        timesteps=[timestep, timestep - 1],
        latents=x,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipeline, step, t, tensors: samples.append(tensors["latents"]) or tensors,
    )
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert_matches(samples[0], mean + torch.exp(0.5 * log_variance) * noise)


@pytest.mark.filterwarnings("ignore:Denoiser 1 has none")
def test_the_scheduler_does_dynamic_thresholding(mixed):
    """It clips x̂0 at s = max(1, the 99.5 % quantile of |x̂0|) and divides it by s, for each sample separately."""
    last = {"timesteps": [0], "num_inference_steps": None, "guidance_scale": 4.0, "output_type": "latent"}
    mixed.scheduler = DDPMScheduler(clip_sample=False)
    latents = torch.randn(2, 4, 8, 8) * torch.tensor([0.2, 3.0]).view(-1, 1, 1, 1)
    x0 = generate(mixed, latents=latents, **last)
    mixed.scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=100.0)
    scale = x0.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    assert scale[0] == 1 and scale[1] > 1
    torch.testing.assert_close(generate(mixed, latents=latents, **last), x0.clamp(-scale, scale) / scale)


# Saving and offloading


@pytest.mark.slow
def test_round_trip_through_a_fresh_process(mixed, tmp_path):
    mixed.register_to_config(guidance_scales=[1.5, 1.0])
    mixed.save_pretrained(tmp_path / "pipeline")
    assert {path.parent.name for path in (tmp_path / "pipeline").glob("*/*.safetensors")} == {
        "denoiser_0",
        "denoiser_1",
    }
    torch.save(generate(mixed), tmp_path / "images.pt")
    script = f"""
import torch
from diffusers import DiffusionPipeline
import diffusers_dmp
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "pipeline")!r})
assert [type(each).__name__ for each in pipeline.denoisers] == ["DTRTransformer2DModel", "PatchedUNet2DModel"]
generator = torch.Generator().manual_seed(0)
images = pipeline([1, 2], num_inference_steps=6, output_type="pt", generator=generator).images
torch.testing.assert_close(images, torch.load({str(tmp_path / "images.pt")!r}))
pipeline.save_pretrained({str(tmp_path / "again")!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    again = SNRSplitPipeline.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(generate(quiet(again)), generate(mixed))
    torch.testing.assert_close(
        generate(quiet(SNRSplitPipeline(**again.components, **settings(again)))), generate(mixed)
    )


def settings(pipeline: SNRSplitPipeline) -> dict:
    return {name: pipeline.config[name] for name in ("snr_boundaries", "prediction_types", "guidance_scales")}


def test_only_the_working_denoiser_is_on_the_accelerator(monkeypatch):
    """Counted by the hooks that would move the denoisers: the tests run without an accelerator."""
    denoisers = [Toy(1.3), Toy(1.0), Toy(0.7)]
    vae = randomised(AutoencoderKL(latent_channels=3, block_out_channels=(4,), norm_num_groups=2, sample_size=8))
    pipeline = quiet(SNRSplitPipeline(denoisers, DDIMScheduler(prediction_type="sample"), [2.0, 0.25], vae))
    pipeline.enable_model_cpu_offload(device="cpu")
    present, counts, pre_forward = [], [], CpuOffload.pre_forward

    def record_arrival(hook, module, *args, **kwargs):
        moved = pre_forward(hook, module, *args, **kwargs)
        if module not in present:
            present.append(module)
        counts.append(len(present))
        return moved

    def watch() -> None:
        present.clear()
        for user_hook in pipeline._all_hooks:  # new ones after each call
            monkeypatch.setattr(
                user_hook, "offload", lambda model=user_hook.model: present.remove(model) if model in present else None
            )

    monkeypatch.setattr(CpuOffload, "pre_forward", record_arrival)
    watch()
    # also if the denoiser between them has no step: its hook would have moved the one for much noise away
    with pytest.warns(UserWarning, match="Denoiser 1 has none"):
        pipeline(num_inference_steps=4, snr_boundaries=[0.26, 0.25], generator=torch.Generator().manual_seed(0))
    assert len(denoisers[0].calls) > 0 and len(denoisers[2].calls) > 0
    # and if the denoiser for little noise has none: the hook of the VAE would have called its hook
    watch()
    with pytest.warns(UserWarning, match="Denoiser 0 has none"):
        pipeline.scheduler = DDIMScheduler(prediction_type="sample", timestep_spacing="trailing")
        pipeline(num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert set(counts) == {1}


def test_refuses_to_save_a_denoiser_with_prompts(mixed, tmp_path):
    patch = PromptPatch.for_transformer(mixed.denoiser_0).attach(mixed.denoiser_0)
    generate(mixed)
    with pytest.raises(ValueError, match="no folder, but got a `PromptPatch` on denoiser 0"):
        mixed.save_pretrained(tmp_path)
    patch.detach()
    mixed.save_pretrained(tmp_path)


@pytest.mark.group_offload
def test_group_offloading_changes_nothing(mixed):
    images = generate(mixed)
    mixed.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(generate(mixed), images)


def test_from_pipelines(tiny_dit):
    unet = randomised(PatchedUNet2DModel(**UNET))
    first = ClassConditionalPipeline(tiny_dit, DDIMScheduler(), id2label={"0": "cat"})
    second = ClassConditionalPipeline(unet, DDIMScheduler(prediction_type="sample"))
    pipeline = SNRSplitPipeline.from_pipelines([first, second], [0.25])
    assert pipeline.denoisers == [tiny_dit, unet]
    assert pipeline.config.prediction_types == ["epsilon", "sample"] and pipeline.config.id2label == {"0": "cat"}
    other = ClassConditionalPipeline(unet, DDIMScheduler(beta_schedule="linear", beta_end=0.03))
    with pytest.raises(ValueError, match="one noise schedule"):
        SNRSplitPipeline.from_pipelines([first, other], [0.25])
    with pytest.raises(ValueError, match="a `transformer` or `unet`, but got a DiffusionPipeline"):
        SNRSplitPipeline.from_pipelines([first, DiffusionPipeline()], [0.25])


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"snr_boundaries": [1.0, 0.25]}, "make intervals, 3, but got 2"),
        ({"snr_boundaries": [-0.25]}, "positive and to descend"),
        ({"prediction_types": ["sample"]}, "`prediction_types` to be one for each of 2 denoisers"),
        ({"guidance_scales": [1.0, 1.0, 1.0]}, "`guidance_scales` to be one for each of 2 denoisers"),
        (
            {"prediction_types": ["sample", "epsilon"]},
            "denoiser 1 .* 'sample' that it was trained for, but got 'epsilon'",
        ),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        SNRSplitPipeline(
            **{"denoisers": [Toy(1.0), Toy(2.0)], "scheduler": DDIMScheduler(), "snr_boundaries": [0.25]} | arguments
        )


def test_arguments_that_do_not_exist():
    with pytest.raises(TypeError, match=r"got the arguments \['snr_boundary'\]"):
        SNRSplitPipeline([Toy(1.0)], DDIMScheduler(), snr_boundary=[0.25])


def test_denoisers_that_do_not_fit():
    unet = PatchedUNet2DModel(**UNET | {"snr_interval": (None, 0.25)})
    SNRSplitPipeline([unet, unet.from_config(unet.config, snr_interval=None)], DDIMScheduler(), [0.25])
    whole = unet.from_config(unet.config, snr_interval=(None, None))
    pipeline = SNRSplitPipeline([unet, whole], DDIMScheduler(), [0.25])
    with pytest.raises(ValueError, match="denoiser 0 .* ratios inf to 0.2, but got one for inf to 0.25"):
        SNRSplitPipeline([unet, whole], DDIMScheduler(), [0.2])
    with pytest.warns(UserWarning, match="denoiser 0 .* ratios inf to 0.2, but got one for inf to 0.25"):
        generate(quiet(pipeline), snr_boundaries=[0.2])
    generate(pipeline, snr_boundaries=[0.5])  # it was trained on these
    with pytest.raises(ValueError, match="the `in_channels` 4 of the first, but got 3 for denoiser 1"):
        SNRSplitPipeline([unet, Toy(1.0)], DDIMScheduler(), [0.25])
    longer = PatchedUNet2DModel(**UNET | {"num_train_timesteps": 4000})
    with pytest.raises(ValueError, match="`num_train_timesteps` to be the model's 4000"):
        generate(SNRSplitPipeline([unet, longer], DDIMScheduler(), [0.25]))
    with pytest.raises(ValueError, match="the 10 classes of the first, but got 5 for denoiser 1"):
        SNRSplitPipeline([unet, PatchedUNet2DModel(**UNET | {"num_classes": 5})], DDIMScheduler(), [0.25])
    with pytest.raises(ValueError, match="1 to 32 `denoisers`, but got 0"):
        SNRSplitPipeline([], DDIMScheduler(), [])
    with pytest.raises(ValueError, match="whose timesteps have no SNR"):
        SNRSplitPipeline([Toy(1.0), Toy(2.0)], diffusers.KarrasVeScheduler(), [0.25])


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=["flow-matching", "of flow sigmas"],
)
def test_predictions_that_cannot_be_converted(scheduler):
    pipeline = SNRSplitPipeline([Toy(1.0), Toy(2.0)], scheduler, [0.25])
    with pytest.raises(ValueError, match="with other noise levels"):
        pipeline(num_inference_steps=2)


def test_a_guidance_scale_for_each(mixed):
    with pytest.raises(ValueError, match="a number or 2 of them, but got 3"):
        generate(mixed, guidance_scale=[1.0, 1.0, 1.0])
