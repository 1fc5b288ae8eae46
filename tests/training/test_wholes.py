"""Whole denoisers of text-to-image pipelines: all weights of one, or one for each noise interval."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from runs import launch_script, launch_with_fsdp2
from text_runs import encode_pipeline
from tiny_pipelines import generate, wan
from tiny_pipelines import sd3 as tiny_sd3

from diffusers_dmp import DenoiserExperts, NoiseIntervals
from diffusers_dmp.training.export import export_checkpoint
from diffusers_dmp.training.metrics_file import read_metrics
from diffusers_dmp.training.text_to_image.wholes import first_experts


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return encode_pipeline("sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return encode_pipeline("sdxl", tmp_path_factory.mktemp("sdxl"))


def train(encoded, folder, **arguments):
    return encoded.train(folder, **{"rank": 16} | arguments)  # of LoRA, which is left at its default


def summary(folder):
    return json.loads((folder / "training_summary.json").read_text())


def test_all_weights_are_trained_and_saved_as_a_whole_pipeline(sd3, tmp_path):
    output = train(sd3, tmp_path, method="full", ema_decay=0.5, gradient_checkpointing=True)
    trained, base = (DiffusionPipeline.from_pretrained(folder) for folder in (output / "pipeline", sd3.pipeline))
    assert type(trained.transformer) is SD3Transformer2DModel
    before, after = base.transformer.state_dict(), trained.transformer.state_dict()
    assert sum(torch.equal(after[name], before[name]) for name in before) < len(before) / 10
    assert not torch.equal(generate("sd3", trained), generate("sd3", base))
    encoded = [pipe.encode_prompt(prompt="a", prompt_2="a", prompt_3="a")[0] for pipe in (trained, base)]
    assert torch.equal(*encoded)  # the text encoders are there, and as they were


SLOW_SDXL = ["sd3", pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SLOW_SDXL)
def test_experts_are_trained_together_and_one_by_one(name, request, tmp_path):
    """The loss of an expert nobody trained does not move, while that of the trained one falls."""
    encoded = request.getfixturevalue(name)
    base = DiffusionPipeline.from_pretrained(encoded.pipeline)
    before = getattr(base, component(name)).state_dict()

    output, losses = train_experts(encoded, encoded.pipeline, tmp_path / "together", max_train_steps=2)
    trained = DiffusionPipeline.from_pretrained(output / "pipeline")
    experts = getattr(trained, component(name))
    assert type(experts) is DenoiserExperts and experts.intervals == NoiseIntervals((0, 500, 1000))
    for expert in experts.experts:
        after = expert.state_dict()
        assert sum(torch.equal(after[key], before[key]) for key in before) < len(before) / 10
    assert summary(output)["samples_per_expert"] == [4, 4]
    assert not torch.equal(generate(name, trained), generate(name, base))
    export_checkpoint(output / "checkpoint-2", tmp_path / "exported")
    exported = getattr(DiffusionPipeline.from_pretrained(tmp_path / "exported"), component(name)).state_dict()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in experts.state_dict().items())

    settings = {"expert": "1", "max_train_steps": 30, "logging_steps": 30, "checkpointing_steps": 30, "batch_size": 8}
    output, _ = train_experts(encoded, encoded.pipeline, tmp_path / "one", **settings)
    trained = DiffusionPipeline.from_pretrained(output / "expert_1/pipeline")
    untrained = getattr(trained, component(name)).experts[0].state_dict()
    assert all(torch.equal(tensor, untrained[key]) for key, tensor in before.items())
    # the next training begins with that pipeline
    _, losses_then = train_experts(encoded, output / "expert_1/pipeline", tmp_path / "next", max_train_steps=1)
    assert losses_then["validation_loss/0-500"] == losses["validation_loss/0-500"]
    assert losses_then["validation_loss/500-1000"] < 0.97 * losses["validation_loss/500-1000"]


def component(name):
    return "unet" if name == "sdxl" else "transformer"


def train_experts(encoded, pipeline, folder, **settings):
    """A training of two experts, and the losses by interval before it."""
    output = train(
        encoded, folder, method="denoiser_experts", pretrained_model_name_or_path=str(pipeline), ema_decay=0.0,
        timestep_boundaries=[500.0], **{"validation_dataset": str(encoded.shards), "validation_repeats": 4} | settings,
    )  # fmt: skip
    return output, {} if "expert" in settings else summary(output)["before"]


def test_experts_of_other_intervals():
    experts = DenoiserExperts([tiny_sd3(seed=0), tiny_sd3(seed=1)], NoiseIntervals.from_sigmas([0.5]))
    source = SimpleNamespace(called=experts, name="mine")
    assert first_experts(source, NoiseIntervals.from_timesteps([500])) is experts
    with pytest.raises(ValueError, match="experts in 'mine', `--timestep_boundaries 500`, but got 400."):
        first_experts(source, NoiseIntervals.from_sigmas([0.4]))


@pytest.fixture(scope="module")
def wan22(tmp_path_factory):
    """Two transformers, as Wan2.2's, with what the first encoded."""
    folder = tmp_path_factory.mktemp("wan22")
    encoded = encode_pipeline("wan", folder)
    pipe = DiffusionPipeline.from_pretrained(encoded.pipeline)
    pipe.register_modules(transformer_2=wan(seed=1))
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(encoded.pipeline)
    return encoded


@pytest.mark.parametrize("expert", ["0", pytest.param("all", marks=pytest.mark.slow)])
def test_the_two_transformers_of_wan22(wan22, tmp_path, expert):
    """Transformer and expert 1 have the much noise; what is trained is saved as the pipeline that it was."""
    output = train(wan22, tmp_path, method="denoiser_experts", sigma_boundaries=[0.875], expert=expert, ema_decay=0.0)
    folder = (output if expert == "all" else output / f"expert_{expert}") / "pipeline"
    trained, base = (DiffusionPipeline.from_pretrained(each) for each in (folder, wan22.pipeline))
    assert type(trained) is type(base) and trained.config.boundary_ratio == 0.875
    moved = [
        any(not torch.equal(a, b) for a, b in zip(*(getattr(each, name).parameters() for each in (trained, base))))
        for name in ("transformer_2", "transformer")
    ]
    assert moved == [expert in ("all", "0"), expert in ("all", "1")]


def test_the_boundary_of_wan22_decides(wan22, tmp_path):
    with pytest.raises(ValueError, match="a boundary where .* changes its denoiser, at the timestep 875"):
        train(wan22, tmp_path, method="denoiser_experts", sigma_boundaries=[0.9])
    with pytest.raises(ValueError, match="`--timestep_boundaries 875`, but got 500 875"):
        train(wan22, tmp_path, method="denoiser_experts", sigma_boundaries=[0.5, 0.875])


@pytest.mark.parametrize("name", ["sd3", pytest.param("wan22", marks=pytest.mark.slow)])
def test_samples_of_one_expert_are_made_with_all(name, request, tmp_path):
    output = train(
        request.getfixturevalue(name), tmp_path, method="denoiser_experts", sigma_boundaries=[0.875], expert="0", max_train_steps=1,
        checkpointing_steps=1, sample_steps=1, validation_prompts=["a"], sample_inference_steps=2, sample_height=16,
        sample_width=16,
    )  # fmt: skip
    assert (output / "expert_0/samples/step-1.png").read_bytes()


def test_a_streamed_training_is_resumed_bit_for_bit(sd3, tmp_path):
    settings = {
        "method": "full", "streaming": True, "shuffle_buffer_size": 5, "max_train_steps": 4}  # fmt: skip
    whole = train(sd3, tmp_path / "whole", **settings)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed/checkpoint-2")
    resumed = train(sd3, tmp_path / "resumed", resume_from_checkpoint="latest", **settings)
    weights = [
        DiffusionPipeline.from_pretrained(each / "pipeline").transformer.state_dict() for each in (whole, resumed)
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


@pytest.mark.slow
def test_two_processes_stream_and_resume(sd3, tmp_path):
    settings = {
        "method": "full", "streaming": True, "shuffle_buffer_size": 3, "max_train_steps": 4, "rank": 16,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch_script("train_text_to_image.py", whole, 2, sd3.arguments(whole, **settings))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    with pytest.raises(
        ValueError, match="Expected as many processes as .*checkpoint-2 was written by, 2, .* but got 1"
    ):
        train(sd3, resumed, resume_from_checkpoint="latest", **settings)
    launch_script(
        "train_text_to_image.py", resumed, 2, sd3.arguments(resumed, resume_from_checkpoint="latest", **settings)
    )
    weights = [
        DiffusionPipeline.from_pretrained(each / "pipeline").transformer.state_dict() for each in (whole, resumed)
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_streams_are_not_read_by_workers(sd3, tmp_path):
    with pytest.raises(ValueError, match="`dataloader_num_workers` to be 0 with `streaming`"):
        train(sd3, tmp_path, streaming=True, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="`shuffle_buffer_size` to be at least 1, but got 0"):
        train(sd3, tmp_path, streaming=True, shuffle_buffer_size=0)


SETTINGS = {
    "full": {"method": "full"},
    "mixed": {"method": "denoiser_experts", "sigma_boundaries": [0.5]},
    "one": {"method": "denoiser_experts", "sigma_boundaries": [0.5], "expert_batches": "one"},
    "expert": {"method": "denoiser_experts", "sigma_boundaries": [0.5], "expert": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("launcher", ["fsdp2", "ddp"])
def test_two_processes_follow_one(sd3, tmp_path, name, launcher):
    """With validation, samples and averaged weights; with DDP also where a process has no sample of an expert."""
    settings = SETTINGS[name] | {
        "rank": 16, "max_grad_norm": 1.0, "ema_decay": 0.5, "validation_dataset": str(sd3.shards), "batch_size": 4,
        "gradient_checkpointing": True, "sample_steps": 1, "validation_prompts": ["a"], "sample_inference_steps": 2,
        "sample_height": 16, "sample_width": 16, "learning_rate": 1e-3,
    }  # fmt: skip
    if launcher == "ddp" and name == "mixed":
        settings |= {"gradient_accumulation_steps": 2}  # one sample at a time
    if launcher == "ddp" and name == "one":
        settings |= {
            "max_train_steps": 1,
            "checkpointing_steps": 1,
        }  # of which both processes happen to train one expert
    one = train(sd3, tmp_path / "one", **settings)
    arguments = sd3.arguments(tmp_path / "two", **settings)
    if launcher == "fsdp2":
        launch_with_fsdp2("train_text_to_image.py", 2, arguments)
        assert list((tmp_path / "two").glob("**/checkpoint-2/pytorch_model_fsdp_0/__1_0.distcp"))
    else:
        launch_script("train_text_to_image.py", tmp_path / "two", 2, arguments)
    one, two = (folder / "expert_1" if name == "expert" else folder for folder in (one, tmp_path / "two"))
    for expected, found in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    for moment in ("before", "after"):
        assert summary(two)[moment] == pytest.approx(summary(one)[moment], rel=1e-4)
    weights = [DiffusionPipeline.from_pretrained(each / "pipeline").transformer.state_dict() for each in (one, two)]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=1e-4, rtol=1e-3)
    assert (two / "samples/step-1.png").read_bytes() == (one / "samples/step-1.png").read_bytes()
