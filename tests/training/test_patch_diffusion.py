"""Patch Diffusion's training: one UNet for each interval of noise levels, or all of them and their pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from diffusers import DiffusionPipeline
from PIL import Image
from runs import TINY, launch_script

from diffusers_dmp import ClassConditionalPipeline, NoiseIntervals, PatchedUNet2DModel, SNRSplitPipeline
from diffusers_dmp.evaluation.digits import write_image_folder
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.objectives import from_arguments
from diffusers_dmp.training.objectives.from_arguments import make_scheduler

TINY_UNET = {name: value for name, value in TINY.items() if name not in ("num_layers", "num_attention_heads")} | {
    "patch_size": 2,
    "model_channels": 32,
    "channel_multipliers": [1, 2],
    "layers_per_block": 1,
    "attention_levels": [1],
    "attention_head_dim": 16,
    "max_train_steps": 2,
}


@pytest.fixture
def train_patch_here(digits, monkeypatch):
    """In this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_patch_diffusion import PatchDiffusionTrainingArguments, train_patch_diffusion

    def train(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY_UNET | {"dataset": str(digits), "report_to": "none", "output_dir": str(output_dir)}
        train_patch_diffusion(PatchDiffusionTrainingArguments(**defaults | arguments))

    return train


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_experts_as_users_start_them(digits, tmp_path, num_processes):
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(TINY_UNET | {"snr_boundaries": [0.25], "dataset": str(digits), "report_to": "none"}))
    launch_script("train_patch_diffusion.py", tmp_path / "run", num_processes, {"config": preset})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline) is SNRSplitPipeline
    assert [denoiser.config.snr_interval for denoiser in pipeline.denoisers] == [[None, 0.25], [0.25, None]]
    assert pipeline.config.prediction_types == ["sample", "sample"]
    assert pipeline("7", num_inference_steps=3, guidance_scale=[1.0, 1.5]).images[0].size == (8, 8)
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["steps"] == 4
    assert [expert["samples_per_expert"] for expert in summary["experts"]] == [[32, 0], [0, 32]]


def test_an_expert_sees_its_own_interval_of_noise(train_patch_here, tmp_path, monkeypatch):
    seen, forward = [], PatchedUNet2DModel.forward

    def remember(model, sample, timestep, **kwargs):
        seen.append(timestep)
        return forward(model, sample, timestep, **kwargs)

    monkeypatch.setattr(PatchedUNet2DModel, "forward", remember)
    train_patch_here(tmp_path, snr_boundaries=[2.0, 0.25], expert="1")
    intervals = NoiseIntervals.from_snr([2.0, 0.25], make_scheduler(TrainingArguments(), in_latents=False))
    assert (intervals.index(torch.cat(seen)) == 1).all()
    saved = PatchedUNet2DModel.from_pretrained(tmp_path / "expert_1" / "pipeline", subfolder="transformer")
    assert saved.config.snr_interval == [2.0, 0.25] and not (tmp_path / "pipeline").exists()

    seen.clear()
    held_out = write_image_folder(tmp_path / "held_out", range(100))
    validated = {"validation_dataset": str(held_out), "max_train_steps": 1}
    train_patch_here(tmp_path / "validated", snr_boundaries=[2.0, 0.25], expert=1, **validated)  # a number, as in YAML
    assert (intervals.index(torch.cat(seen)) == 1).all()


def test_all_experts_go_on_where_they_were_stopped(train_patch_here, tmp_path, monkeypatch):
    arguments = {"snr_boundaries": [0.25], "checkpointing_steps": 1, "max_train_steps": 3}
    train_patch_here(tmp_path / "whole", **arguments)

    forward, calls = PatchedUNet2DModel.forward, []

    def fail_in_the_second_experts_second_step(model, *args, **kwargs):
        calls.append(model)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward(model, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PatchedUNet2DModel, "forward", fail_in_the_second_experts_second_step)
        train_patch_here(tmp_path / "stopped", **arguments)
    with pytest.raises(ValueError, match="no checkpoints of an earlier run"):
        train_patch_here(tmp_path / "stopped", **arguments)
    train_patch_here(tmp_path / "stopped", resume_from_checkpoint="latest", **arguments)
    stopped, whole = (DiffusionPipeline.from_pretrained(tmp_path / name / "pipeline") for name in ("stopped", "whole"))
    for resumed, expected in zip(stopped.denoisers, whole.denoisers, strict=True):
        for name, weight in resumed.state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name]), name


def test_one_model_for_all(train_patch_here, tmp_path):
    train_patch_here(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(pipeline) is ClassConditionalPipeline
    assert pipeline.transformer.config.snr_interval == [None, None]


def test_images_without_classes(train_patch_here, tmp_path):
    write_image_folder(tmp_path / "digits" / "all", range(64))
    for image in (tmp_path / "digits" / "all").glob("*/*.png"):
        image.rename(tmp_path / "digits" / image.name)
    shutil.rmtree(tmp_path / "digits" / "all")
    unconditional = {"dataset": str(tmp_path / "digits"), "sample_steps": 1, "sample_inference_steps": 2}
    train_patch_here(tmp_path / "run", **unconditional)
    assert Image.open(tmp_path / "run" / "samples" / "step-2.png").size == (80, 32)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.num_classes is None
    with pytest.raises(ValueError, match="without a null class"):
        pipeline(guidance_scale=2.0)


@pytest.mark.slow
def test_the_digits_preset(digits, tmp_path):
    """As `make demo-patch` trains and reports it."""
    preset = REPOSITORY / "training" / "presets" / "patch_digits.yaml"
    launch_script("train_patch_diffusion.py", tmp_path, 1, {"config": preset, "dataset": digits, "report_to": "none"})
    report = run_report(tmp_path)
    assert report["recognised"] > 0.95 and report["samples"] == 500


@pytest.mark.slow
def test_a_split_pipelines_report(train_patch_here, tmp_path):
    train_patch_here(tmp_path, snr_boundaries=[0.25])
    assert run_report(tmp_path)["steps"] == 4
    assert Image.open(tmp_path / "snr_split.png").size[0] > 500


def run_report(folder: Path) -> dict:
    """What the demo says of a pipeline, in a process of its own."""
    command = [sys.executable, str(REPOSITORY / "examples" / "digits_demo.py"), "report", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "report.json").read_text())


def test_the_variance_is_learned_in_the_models_own_sense(train_patch_here, tmp_path, monkeypatch):
    made, objective = [], from_arguments.DiffusionObjective

    def remember(*args):
        made.append(args[1:3])
        return objective(*args)

    monkeypatch.setattr(from_arguments, "DiffusionObjective", remember)
    train_patch_here(tmp_path / "learned", max_train_steps=1)
    train_patch_here(tmp_path / "fixed", max_train_steps=1, learn_sigma=False)
    assert made == [("sqrt_snr", "learned_range_sigmoid"), ("sqrt_snr", None)]


def test_linear_schedules_up_to_another_beta():
    scheduler = make_scheduler(TrainingArguments(beta_schedule="linear0.025"), in_latents=False)
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.025, 1000))


def test_an_expert_that_there_is_not(train_patch_here, tmp_path):
    with pytest.raises(ValueError, match="`expert` to be one of all, 0, 1, but got '2'"):
        train_patch_here(tmp_path, snr_boundaries=[0.25], expert="2")


def test_one_checkpoint_for_several_experts(train_patch_here, tmp_path):
    with pytest.raises(ValueError, match="'latest', each expert's own, to go on with all experts, but got 'here'"):
        train_patch_here(tmp_path, snr_boundaries=[0.25], resume_from_checkpoint="here")
