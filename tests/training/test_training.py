"""Training, as users start it: resumed bit for bit, and the same on any number of processes."""

import dataclasses
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline
from runs import launch, logged, train_here, weights
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.models.dit.layers import DiTAttention
from diffusers_dmp.training import trainer
from diffusers_dmp.training.arguments import DiTTrainingArguments


@pytest.fixture(scope="module")
def reference_run(digits, tmp_path_factory) -> Path:
    """Four steps of DTR in one process."""
    output_dir = tmp_path_factory.mktemp("reference")
    launch("train_dtr.py", output_dir, dataset=digits, sharing_ratio=0.5, sample_steps=4, sample_inference_steps=2,
           max_grad_norm=1.0, checkpoints_total_limit=2, pipeline_steps=2)  # fmt: skip
    return output_dir


def test_a_run_leaves_everything_that_a_user_needs(reference_run):
    pipeline = DiffusionPipeline.from_pretrained(reference_run / "pipeline")
    assert type(pipeline.transformer) is DTRTransformer2DModel
    assert pipeline.transformer.config.sharing_ratio == 0.5
    assert pipeline.transformer.config.num_classes == 10
    assert pipeline.config.id2label == {str(digit): str(digit) for digit in range(10)}
    assert pipeline("7", num_inference_steps=2).images[0].size == (8, 8)

    assert PIL.Image.open(reference_run / "samples" / "step-4.png").size == (80, 32)  # ten classes, four rows
    arguments = yaml.safe_load((reference_run / "training_arguments.yaml").read_text())
    assert arguments["sharing_ratio"] == 0.5 and arguments["beta_schedule"] == "linear"
    assert sorted(path.name for path in reference_run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_pipelines_along_the_way_have_averaged_weights_too(reference_run):
    (early, late, end) = (
        load_file(reference_run / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("pipeline-2", "pipeline-4", "pipeline")
    )
    assert all(torch.equal(late[name], end[name]) for name in end)
    assert any(not torch.equal(early[name], end[name]) for name in end)


def test_a_run_logs_its_loss_by_interval_of_timesteps(reference_run):
    assert list(logged(reference_run, "loss")) == [1, 2, 3, 4]
    for name in ("loss_by_timestep/0000-0124", "loss_by_timestep/0875-0999", "images_per_second", "lr", "grad_norm"):
        assert logged(reference_run, name), name


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_did(reference_run, digits, tmp_path):
    shutil.copytree(reference_run / "checkpoint-2", tmp_path / "checkpoint-2")
    launch("train_dtr.py", tmp_path, dataset=digits, sharing_ratio=0.5, max_grad_norm=1.0,
           resume_from_checkpoint="latest")  # fmt: skip
    assert list(logged(tmp_path, "loss")) == [3, 4]
    expected = weights(reference_run)
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, expected[name]), name


def test_two_processes_follow_the_loss_of_one(reference_run, digits, tmp_path):
    launch("train_dtr.py", tmp_path, num_processes=2, dataset=digits, sharing_ratio=0.5, max_grad_norm=1.0)
    assert (tmp_path / "checkpoint-4" / "random_states_1.pkl").exists()  # there was a second process
    for name in ("loss", "grad_norm", "loss_by_timestep/0000-0124"):
        assert logged(tmp_path, name) == pytest.approx(logged(reference_run, name), rel=1e-4)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, weights(reference_run)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_learn_the_same_uncertainty(digits, tmp_path):
    train_here(DTRTransformer2DModel, digits, tmp_path / "one", weighting="uw")
    launch("train_dtr.py", tmp_path / "two", num_processes=2, dataset=digits, weighting="uw")
    one, two = (load_file(tmp_path / run / "checkpoint-4" / "model_1.safetensors") for run in ("one", "two"))
    torch.testing.assert_close(two["uncertainty.log_variances"], one["uncertainty.log_variances"])


def test_two_steps_of_the_baseline(digits, tmp_path):
    launch("train_dit.py", tmp_path, dataset=digits, max_train_steps=2, report_to="none")
    start = DiTModel.from_pretrained(tmp_path / "pipeline", subfolder="transformer")
    assert any((parameter != 0).any() for parameter in start.proj_out_2.parameters())  # zero before training


@pytest.mark.parametrize("weighting", ["constant", "uw"])
def test_accumulated_micro_batches_follow_the_whole_batch(digits, tmp_path, weighting):
    train_here(DiTModel, digits, tmp_path / "whole", weighting=weighting)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, tmp_path / "parts", weighting=weighting, gradient_accumulation_steps=2)
    for name, tensor in weights(tmp_path / "parts").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], atol=1e-5, rtol=1e-4)


def test_uncertainty_is_learned_in_its_own_group_and_resumed(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, weighting="uw", uncertainty_learning_rate=0.025)
    log_variances = load_file(tmp_path / "checkpoint-4" / "model_1.safetensors")["uncertainty.log_variances"]
    # Adam moves by its learning rate a step at first
    assert log_variances.abs().max() == pytest.approx(4 * 0.025, rel=0.05)
    expected = weights(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, tmp_path, weighting="uw", resume_from_checkpoint="latest")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())


def test_uncertainty_in_mixed_precision(digits, tmp_path):
    """Accelerate converts the outputs of what learns, the objective among it, and rebuilds them."""
    train_here(DiTModel, digits, tmp_path, weighting="uw", mixed_precision="bf16", max_train_steps=2)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_every_prediction_type_trains_and_samples(digits, tmp_path, prediction_type, learn_sigma):
    train_here(
        DTRTransformer2DModel, digits, tmp_path, prediction_type=prediction_type, learn_sigma=learn_sigma,
        weighting="min_snr_5", max_train_steps=2, gradient_checkpointing=True, random_flip=True,
    )  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.scheduler.config.prediction_type == prediction_type
    pipeline([1], num_inference_steps=2)


def test_mixed_precision(digits, tmp_path):
    dtypes = set()

    def remember(attention, args, output):
        dtypes.add(output.dtype)

    with register_module_forward_hook(
        lambda module, args, output: remember(module, args, output) if isinstance(module, DiTAttention) else None
    ):
        train_here(DTRTransformer2DModel, digits, tmp_path, mixed_precision="bf16", max_train_steps=2)
    assert dtypes == {torch.bfloat16}
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_latents_of_a_vae(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):  # without classes
        PIL.Image.effect_noise((40, 32), 30 * i).convert("RGB").save(images / f"{i}.png")
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    train_here(
        DiTModel, images, tmp_path / "run", vae=str(tmp_path / "vae"), image_size=32, image_channels=3, random_flip=True,
        max_train_steps=2,
    )  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.sample_size == 16 and pipeline.transformer.config.in_channels == 4
    assert pipeline.num_classes == 1 and not pipeline.has_null_class
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline(batch_size=1, num_inference_steps=2).images[0].size == (32, 32)
    trained = load_file(tmp_path / "run" / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in vae.state_dict().items())  # frozen


def test_the_averaged_weights_are_the_ones_saved(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, ema_decay=0.5, max_train_steps=2, checkpointing_steps=1)
    first, second = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2))
    # Diffusers' warm-up: the average starts at the first step's weights; its decay is then (1 + 1) / (10 + 1)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, torch.lerp(second[name], first[name], 2 / 11))

    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, tmp_path / "raw", ema_decay=0.0, max_train_steps=2)
    raw = load_file(tmp_path / "raw" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(raw[name], tensor) for name, tensor in weights(tmp_path / "raw").items())


def test_goes_on_from_a_pretrained_pipeline(reference_run, digits, tmp_path):
    train_here(
        DTRTransformer2DModel, digits, tmp_path, pretrained_model_name_or_path=str(reference_run / "pipeline"),
        max_train_steps=1, learning_rate=0.0, ema_decay=0.0,
    )  # fmt: skip
    expected = weights(reference_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize(
    "model_class, arguments, message",
    [
        (DTRTransformer2DModel, {"num_train_timesteps": 500}, "num_train_timesteps. 500.*1000"),
        (DTRTransformer2DModel, {"image_size": 16}, "sample_size. 16.*8"),
        (DTRTransformer2DModel, {"learn_sigma": False}, "out_channels. 1.*2"),
        (DiTModel, {}, "to be a DiTModel, but got a DTRTransformer2DModel"),
    ],
)
def test_refuses_a_pretrained_model_that_does_not_fit(
    reference_run, digits, tmp_path, model_class, arguments, message
):
    with pytest.raises(ValueError, match=message):
        train_here(
            model_class, digits, tmp_path, pretrained_model_name_or_path=str(reference_run / "pipeline"), **arguments
        )


def test_refuses_to_mix_with_the_checkpoints_of_an_earlier_run(reference_run, digits):
    with pytest.raises(ValueError, match="output_dir.*no checkpoints.*checkpoint-4"):
        train_here(DTRTransformer2DModel, digits, reference_run)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="max_train_steps. 2.*checkpoint-4"):
        train_here(DTRTransformer2DModel, digits, reference_run, resume_from_checkpoint="latest", max_train_steps=2)


def test_refuses_a_tracker_that_is_not_there(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "get_available_trackers", lambda: [])  # a machine without any
    with pytest.raises(ValueError, match="report_to.*'tensorboard'"):
        train_here(DiTModel, digits, tmp_path, report_to="tensorboard")


def test_a_run_may_go_back_to_an_earlier_checkpoint(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, checkpointing_steps=1, checkpoints_total_limit=3)
    expected = weights(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(
        DiTModel, digits, tmp_path, checkpointing_steps=1, checkpoints_total_limit=1,
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
    )  # fmt: skip
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())


def test_old_checkpoints_give_way(digits, tmp_path):
    train_here(DiTModel, digits, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weighting": "min_snr"}, "weighting.*min_snr_<gamma>"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"batch_size": 15, "gradient_accumulation_steps": 2}, "batch_size.*divisible by 2.*15"),
        ({"batch_size": 12, "weighting": "uw"}, "batch_size.*8 .timestep clusters.*12"),
        ({"preset": "DiT-M/2"}, "DiT-S/2"),
        ({"patch_size": 3}, "patch_size"),
        ({"resume_from_checkpoint": "elsewhere"}, "resume_from_checkpoint.*'elsewhere'"),
    ],
)
def test_refuses_bad_arguments(digits, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_here(DiTModel, digits, tmp_path, **arguments)


def test_every_argument_explains_itself():
    assert all(field.metadata["help"] for field in dataclasses.fields(DiTTrainingArguments))
