"""Trainings by flow matching, as users start them, and what is made of them."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from runs import TINY, launch, logged, train_here, weights

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.diffusion.schedulers import make_like
from diffusers_dmp.evaluation.diagnostics import diagnose
from diffusers_dmp.training.data.images import load_images

FLOW = {"objective": "flow", "shift": "2"}
CHECKED = {"validation_repeats": 1, "sample_steps": 4, "sample_inference_steps": 2}
SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)


@pytest.fixture(scope="module")
def flow_run(digits, tmp_path_factory) -> Path:
    """Four steps of DTR."""
    output_dir = tmp_path_factory.mktemp("flow")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DTRTransformer2DModel, digits, output_dir, **FLOW, **CHECKED, validation_dataset=str(digits))
    return output_dir


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def dit_run(digits, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("dit")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, output_dir, **FLOW, max_train_steps=2)
    return output_dir


def test_the_pipeline_says_how_it_was_trained(flow_run):
    pipeline = DiffusionPipeline.from_pretrained(flow_run / "pipeline")
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler and pipeline.scheduler.config.shift == 2
    noise = {"process": "flow_matching", "prediction_type": "flow_prediction", "num_train_timesteps": 1000}
    assert pipeline.config.noise_schedule == noise
    assert pipeline.transformer.config.out_channels == 1  # no variance
    arguments = yaml.safe_load((flow_run / "training_arguments.yaml").read_text())
    assert (arguments["objective"], arguments["learn_sigma"]) == ("flow", False)
    summary = json.loads((flow_run / "training_summary.json").read_text())
    assert summary["after"]["validation_loss"] < summary["before"]["validation_loss"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_flow_matching_scheduler_samples_it(flow_run, name):
    pipeline = DiffusionPipeline.from_pretrained(flow_run / "pipeline")
    pipeline.scheduler = make_like(pipeline.scheduler, name)
    assert type(pipeline.scheduler).__name__ == name
    images = pipeline(["7", "3"], num_inference_steps=4, output_type="pt", generator=torch.Generator()).images
    assert images.shape == (2, 1, 8, 8) and images.isfinite().all()


def test_another_scheduler_of_the_command_line_has_the_same_shift():
    trained = FlowMatchEulerDiscreteScheduler(shift=2.5)
    assert type(make_like(trained, "EulerDiscreteScheduler")) is FlowMatchEulerDiscreteScheduler
    unipc = make_like(trained, "UniPCMultistepScheduler")
    assert unipc.config.use_flow_sigmas and unipc.config.flow_shift == 2.5
    assert make_like(unipc, "FlowMatchEulerDiscreteScheduler").config.shift == 2.5
    assert type(make_like(trained, "DDIMScheduler")) is diffusers.DDIMScheduler  # which the pipeline refuses


@pytest.mark.parametrize("shift", [0.6010822404747658, 1.535271256086193])
def test_a_shift_whose_first_step_is_a_last_bit_above_pure_noise(flow_run, shift):
    pipeline = DiffusionPipeline.from_pretrained(flow_run / "pipeline")
    schedulers = [getattr(diffusers, name)(shift=shift) for name in SCHEDULERS[:3]]
    for pipeline.scheduler in schedulers:
        assert len(pipeline(["7"], num_inference_steps=2).images) == 1
    assert max(scheduler.timesteps.max() for scheduler in schedulers) > 1000


def test_diagnosed(flow_run, digits):
    pipeline = DiffusionPipeline.from_pretrained(flow_run / "pipeline")
    diagnosis = diagnose(pipeline, load_images(str(digits)), num_images=8, num_bands=4)
    assert all(0 < loss < 5 for loss in diagnosis.band_losses[0])


def test_resumed_bit_for_bit(flow_run, digits, tmp_path):
    shutil.copytree(flow_run / "checkpoint-2", tmp_path / "checkpoint-2")
    train_here(DTRTransformer2DModel, digits, tmp_path, **FLOW, resume_from_checkpoint="latest")
    assert all(torch.equal(tensor, weights(flow_run)[name]) for name, tensor in weights(tmp_path).items())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="density: 'logit_normal' → 'mode'; shift: '2.0' → '3.0'"):
        train_here(DTRTransformer2DModel, digits, tmp_path, objective="flow", shift="3", density="mode",
                   resume_from_checkpoint="latest", max_train_steps=6)  # fmt: skip


def test_remix_and_prompts_go_on_from_it(dit_run, digits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_dmp import DMPTrainingArguments, train_dmp
    from train_remix import RemixTrainingArguments, train_remix

    names = ("image_size", "image_channels", "random_flip", "batch_size", "learning_rate")
    shared = {name: TINY[name] for name in names} | {"dataset": str(digits), "report_to": "none", "objective": "flow"}
    shared |= {"max_train_steps": 2, "pretrained_model_name_or_path": str(dit_run / "pipeline")}
    remix = RemixTrainingArguments(**shared, num_bases=2, num_experts=3, output_dir=str(tmp_path / "remix"))
    train_remix(remix)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dmp(DMPTrainingArguments(**shared, output_dir=str(tmp_path / "dmp")))
    for name in ("remix", "dmp"):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / name / "pipeline")
        assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
        assert pipeline.scheduler.config.shift == 2  # the base's
        assert len(pipeline(["1"], num_inference_steps=2).images) == 1


def test_another_process_than_the_bases_is_refused_before_it_is_loaded(dit_run, digits, tmp_path):
    with pytest.raises(ValueError, match="another way than `objective` ddpm. Give --objective flow"):
        train_here(DiTModel, digits, tmp_path, pretrained_model_name_or_path=str(dit_run / "pipeline"))


def test_patch_diffusion_is_no_flow_matching(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from train_patch_diffusion import PatchDiffusionTrainingArguments

    with pytest.raises(ValueError, match="`objective` to be ddpm for patch diffusion"):
        PatchDiffusionTrainingArguments(objective="flow")


@pytest.mark.slow
def test_two_processes_follow_one(flow_run, digits, tmp_path):
    launch("train_dtr.py", tmp_path / "one", dataset=digits, **FLOW)
    launch("train_dtr.py", tmp_path / "two", num_processes=2, dataset=digits, **FLOW)
    assert logged(tmp_path / "two", "loss") == pytest.approx(logged(tmp_path / "one", "loss"), rel=1e-4)
    for name, tensor in weights(tmp_path / "two").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "one")[name], atol=1e-5, rtol=1e-4)
