"""Disk and memory: looked at before the first step, explained in one line afterwards, and everything earlier stays."""

import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import train_here

from diffusers_dmp import DiTModel
from diffusers_dmp.saving.whole import remove, written_whole
from diffusers_dmp.training import loop, resources
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.checkpoints import checkpoints, expect_readable


@pytest.fixture
def small_files():
    """Files may have no more than 100 kB, which ends a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_leaves_everything_earlier(digits, tmp_path, request):
    train_here(DiTModel, digits, tmp_path, max_train_steps=2)
    before = files(tmp_path / "checkpoint-2") | files(tmp_path / "pipeline")
    AcceleratorState._reset_state(reset_partial_state=True)
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match="Could not write .*checkpoint-4 .*B are free.*--resume_from_checkpoint latest"):
        train_here(
            DiTModel, digits, tmp_path, max_train_steps=6, checkpoints_total_limit=1, resume_from_checkpoint="latest"
        )
    assert files(tmp_path / "checkpoint-2") | files(tmp_path / "pipeline") == before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    expect_readable(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_pipeline_that_does_not_fit_leaves_nothing(digits, tmp_path, small_files):
    with pytest.raises(OSError, match="Could not write .*/pipeline-1 "):
        train_here(DiTModel, digits, tmp_path, max_train_steps=1, checkpointing_steps=10, pipeline_steps=1)
    assert [path.name for path in tmp_path.glob("pipeline*")] == ["pipeline_config"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_end_that_fails_loses_no_step(digits, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr("diffusers_dmp.pipelines.ClassConditionalPipeline.save_pretrained", fail)
        train_here(DiTModel, digits, tmp_path, max_train_steps=3, checkpointing_steps=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert [path.name for path in tmp_path.glob("pipeline*")] == ["pipeline_config"]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loop.TrainingParts, "losses", fail)  # no step is done again
    train_here(DiTModel, digits, tmp_path, max_train_steps=3, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_a_folder_that_cannot_be_written_is_met_before_the_first_step(digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir.*can be written.*Not a directory|File exists"):
        train_here(DiTModel, digits, tmp_path / "file" / "run")


def test_too_little_space_is_met_before_the_first_step(digits, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(ValueError, match="room for one checkpoint and the pipeline, about .* MB, but got 0.1 MB"):
        train_here(DiTModel, digits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_the_size_of_what_is_written(digits, tmp_path, monkeypatch):
    estimates, check = [], resources.check_output_dir
    monkeypatch.setattr(
        "diffusers_dmp.training.trainer.check_output_dir",
        lambda folder, needed: (estimates.append(needed), check(folder, needed)),
    )
    train_here(DiTModel, digits, tmp_path, max_train_steps=2)
    written = sum(
        file.stat().st_size for folder in ("checkpoint-2", "pipeline") for file in (tmp_path / folder).rglob("*")
    )
    assert estimates[0] == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_says_what_helps(digits, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(loop.TrainingParts, "losses", fail)
    with pytest.raises(ValueError) as found:
        train_here(DiTModel, digits, tmp_path, gradient_accumulation_steps=2)
    for words in ("micro-batches of 8 images of 8 pixels", "--gradient_accumulation_steps 4", "--gradient_checkpointing",
                  "--mixed_precision bf16"):  # fmt: skip
        assert words in str(found.value)


def test_a_real_lack_of_memory_is_recognised():
    args = DiTTrainingArguments(batch_size=1, gradient_checkpointing=True)
    with (
        pytest.raises(ValueError, match="micro-batches of 1 images.*helps: `--mixed_precision bf16`."),
        resources.explained_memory_errors(Accelerator(cpu=True), args),
    ):
        torch.empty(2**60, dtype=torch.uint8)


def test_other_errors_stay():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        resources.explained_memory_errors(Accelerator(cpu=True), DiTTrainingArguments()),
    ):
        raise RuntimeError("shapes")


def test_an_error_while_writing_leaves_what_was_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "new").write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["old"]

    (tmp_path / "folder.unfinished").mkdir()  # what a killed process left does not mix with what is written now
    (tmp_path / "folder.unfinished" / "other").write_text("other")
    with written_whole(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "new").write_text("new")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]
    remove(tmp_path / "folder")
    assert not os.listdir(tmp_path)
