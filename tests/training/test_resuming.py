"""A resumed run does what it is told: what may change takes effect, what may not is refused, broken checkpoints are passed over."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from runs import TINY, logged, train_here, weights
from safetensors.torch import load_file, save_file

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.training import run as training_run
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.checkpoints import RECORD_NAME, checkpoints, expect_readable, latest_checkpoint
from diffusers_dmp.training.resuming import (
    MAY_CHANGE,
    differing_arguments,
    expect_same_run,
    may_change,
    resolved_arguments,
)

ARGUMENTS = {"lr_scheduler": "cosine", "ema_decay": 0.9, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def first_run(digits, tmp_path_factory) -> Path:
    """Four steps, with checkpoints after the second and the fourth."""
    output_dir = tmp_path_factory.mktemp("first")
    train_here(DiTModel, digits, output_dir, **ARGUMENTS)
    return output_dir


@pytest.fixture
def copy(first_run, tmp_path) -> Path:
    """A copy of that run's folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Path(shutil.copytree(first_run, tmp_path / "copy"))


def resume(digits: Path, output_dir: Path, model_class=DiTModel, **arguments) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(model_class, digits, output_dir, **ARGUMENTS | {"resume_from_checkpoint": "latest"} | arguments)


# What may change


def test_new_settings_take_effect(copy, digits, monkeypatch):
    runs, train_from = [], training_run.TrainingRun.train_from

    def remember(run, first_step):
        group = run.parts.optimizer.param_groups[0]
        runs.append((first_step, group["lr"], group["weight_decay"], group["betas"], run.ema.decay))
        return train_from(run, first_step)

    monkeypatch.setattr(training_run.TrainingRun, "train_from", remember)
    changed = {"learning_rate": 5e-4, "weight_decay": 0.3, "adam_beta2": 0.95, "ema_decay": 0.5, "max_train_steps": 8,
               "lr_scheduler": "linear", "checkpointing_steps": 4, "report_to": "tensorboard"}  # fmt: skip
    resume(digits, copy, resume_from_checkpoint=str(copy / "checkpoint-2"), **changed)
    # the new schedule, as if it had been followed from the beginning: two of eight steps down
    assert runs == [(2, pytest.approx(5e-4 * 6 / 8), 0.3, (0.9, 0.95), 0.5)]
    assert logged(copy, "lr")[3] == pytest.approx(5e-4 * 5 / 8)  # that of the next step
    saved = torch.load(copy / "checkpoint-8" / "optimizer.bin")["param_groups"][0]
    assert saved["weight_decay"] == 0.3 and saved["initial_lr"] == 5e-4
    assert yaml.safe_load((copy / "training_arguments.yaml").read_text())["learning_rate"] == 5e-4


def test_unchanged_arguments_repeat_the_run_bit_for_bit(copy, digits, first_run):
    shutil.rmtree(copy / "checkpoint-4")
    resume(digits, copy)
    again, expected = (load_file(run / "checkpoint-4" / "model.safetensors") for run in (copy, first_run))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
    assert all(torch.equal(tensor, weights(first_run)[name]) for name, tensor in weights(copy).items())


def test_a_data_set_may_move(copy, digits, tmp_path):
    moved = shutil.copytree(digits, tmp_path / "moved")
    resume(moved, copy, resume_from_checkpoint=str(copy / "checkpoint-2"))


def test_a_finished_run_says_so_and_writes_its_pipeline(copy, digits, first_run, caplog):
    shutil.rmtree(copy / "pipeline")
    with caplog.at_level(logging.WARNING):
        resume(digits, copy, learning_rate=1e-9)
    assert "checkpoint-4 is at `max_train_steps` already" in caplog.text
    assert json.loads((copy / "training_summary.json").read_text())["steps"] == 4
    # nothing was trained with the new one
    assert yaml.safe_load((copy / "training_arguments.yaml").read_text())["learning_rate"] == TINY["learning_rate"]
    assert all(torch.equal(tensor, weights(first_run)[name]) for name, tensor in weights(copy).items())


def test_a_finished_run_with_its_pipeline_is_left_as_it_is(copy, digits, caplog):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with caplog.at_level(logging.WARNING):
        resume(digits, copy, learning_rate=1e-9, report_to="tensorboard")
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_the_end_of_a_shorter_run_is_its_own(copy, digits):
    """Back at an earlier checkpoint: what is there is of the longer run."""
    resume(digits, copy, max_train_steps=2, resume_from_checkpoint=str(copy / "checkpoint-2"))
    average = torch.load(copy / "checkpoint-2" / "custom_checkpoint_1.pkl", weights_only=True)["shadow_params"]
    assert any(torch.equal(average[0], tensor) for tensor in weights(copy).values())
    assert yaml.safe_load((copy / "training_arguments.yaml").read_text())["max_train_steps"] == 2


# What may not


def test_every_difference_is_listed(copy, digits, tmp_path):
    before = (copy / "training_arguments.yaml").read_text()
    with pytest.raises(ValueError) as error:
        resume(digits, copy, batch_size=32, prediction_type="sample", learning_rate=1.0, ema_decay=0.0)
    for difference in ("checkpoint-4", "batch_size: 16 → 32", "prediction_type: 'epsilon' → 'sample'",
                       "ema_decay: 0.9 → 0.0"):  # fmt: skip
        assert difference in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert (copy / "training_arguments.yaml").read_text() == before  # nothing is written yet

    fewer = shutil.copytree(digits, tmp_path / "fewer")
    shutil.rmtree(fewer / "9")
    with pytest.raises(ValueError, match="images: 200 → .*classes: 10 .*→ 9 .*labels: .*image files: "):
        resume(fewer, copy)
    others = shutil.copytree(digits, tmp_path / "others")
    file = next((others / "3").iterdir())
    file.rename(file.with_name(f"other_{file.name}"))
    with pytest.raises(ValueError, match="other ones: image files: '.*' → '.*'. To train"):
        resume(others, copy)
    record = {"arguments": {}, "identity": {}, "loss_scaling": True}
    with pytest.raises(ValueError, match="mixed_precision: without loss scaling → fp16"):
        expect_same_run(copy / "checkpoint-4", record, DiTTrainingArguments())
    with pytest.raises(ValueError, match="model: 'DiTModel' → 'DTRTransformer2DModel'"):
        resume(digits, copy, DTRTransformer2DModel)


def test_an_older_checkpoint_is_compared_with_its_runs_arguments(copy, digits, tmp_path, caplog):
    for checkpoint in checkpoints(copy):
        (checkpoint / RECORD_NAME).unlink()
    with pytest.raises(ValueError, match="seed: 0 → 1"):
        resume(digits, copy, seed=1)
    moved = shutil.copytree(digits, tmp_path / "moved")  # nothing says that its contents are the same
    with pytest.raises(ValueError, match="dataset: .*digits.* → .*/move"):
        resume(moved, copy)
    with caplog.at_level(logging.WARNING):
        resume(digits, copy, learning_rate=1e-4)
    assert "images and classes: they are not compared" in caplog.text


@pytest.mark.parametrize("script", ["dtr", "remix", "dmp", "patch_diffusion", "ppap"])
def test_what_may_change_is_decided_for_every_argument(script, monkeypatch):
    """The objective, the data and the model stay; a name that no training has would be a misspelt one."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    module = __import__(f"train_{script}")
    (arguments_class,) = (value for name, value in vars(module).items() if name.endswith("TrainingArguments")
                          and getattr(value, "__module__", "") == module.__name__)  # fmt: skip
    names = {field.name for field in dataclasses.fields(arguments_class)}
    assert names >= MAY_CHANGE - {"expert"}
    for name in ("learning_rate", "max_train_steps", "ema_decay", "validation_dataset", "report_to"):
        assert may_change(name)
    for name in names & {"batch_size", "seed", "weighting", "image_size", "num_layers", "snr_boundaries", "num_experts",
                         "prior_loss_weight", "method", "beta_schedule", "random_flip", "label_column"}:  # fmt: skip
        assert not may_change(name)


def test_an_argument_that_is_new_had_its_default():
    args = DiTTrainingArguments(class_dropout_prob=0.1)
    now = resolved_arguments(args)
    older = {name: value for name, value in now.items() if name != "class_dropout_prob"}
    assert differing_arguments(older, now, args) == []
    other = resolved_arguments(dataclasses.replace(args, class_dropout_prob=0.2))
    assert differing_arguments(older, other, args) == ["class_dropout_prob: 0.1 → 0.2"]
    assert differing_arguments(now | {"sharing_ratio": 0.8}, now, args) == ["sharing_ratio: 0.8 → None"]


def test_a_checkpoint_of_before_flow_matching_was_ddpm():
    """As version 0.3.0 recorded it: with what is learned and predicted, without the arguments of flow matching."""
    args = DiTTrainingArguments()
    now = resolved_arguments(args)
    new = {"objective", "density", "logit_mean", "logit_std", "mode_scale", "shift"}
    older = {name: value for name, value in now.items() if name not in new}
    assert (older["learn_sigma"], older["prediction_type"]) == (True, "epsilon")
    assert differing_arguments(older, now, args) == []
    flow = DiTTrainingArguments(objective="flow")
    found = differing_arguments(older, resolved_arguments(flow), flow)
    assert "objective: 'ddpm' → 'flow'" in found and "learn_sigma: True → False" in found


# Broken checkpoints


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


DAMAGE = {
    "an empty folder": lambda folder: [file.unlink() for file in folder.iterdir()],
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "a cut optimiser": lambda folder: cut(folder / "optimizer.bin"),
    "no optimiser": lambda folder: (folder / "optimizer.bin").unlink(),
    "no average": lambda folder: (folder / "custom_checkpoint_1.pkl").unlink(),
    "NaN": lambda folder: with_nan(folder / "model.safetensors"),
    "a cut record": lambda folder: cut(folder / RECORD_NAME),
}
MESSAGES = {
    "an empty folder": "model.safetensors.*missing",
    "cut weights": "model.safetensors.*bytes instead of",
    "a cut optimiser": "optimizer.bin.*bytes instead of",
    "no optimiser": "optimizer.bin.*missing",
    "no average": "custom_checkpoint_1.pkl.*missing",
    "NaN": "model.safetensors.*not finite",
    "a cut record": f"{RECORD_NAME}.*cannot be read",
}
MESSAGES_WITHOUT_RECORD = {
    "cut weights": "model.safetensors.*cannot be read",
    "a cut optimiser": "optimizer.bin.*cannot be read",
    "no optimiser": "optimizer.bin.*missing",
}


@pytest.mark.parametrize(
    "damage, message, has_record",
    [(*item, True) for item in MESSAGES.items()] + [(*item, False) for item in MESSAGES_WITHOUT_RECORD.items()],
)
def test_a_broken_checkpoint_is_passed_over_or_refused_by_name(copy, digits, caplog, damage, message, has_record):
    if not has_record:  # as in version 0.2
        (copy / "checkpoint-4" / RECORD_NAME).unlink()
    DAMAGE[damage](copy / "checkpoint-4")
    with pytest.raises(ValueError, match=f"checkpoint-4 .*{message}"):
        resume(digits, copy, resume_from_checkpoint=str(copy / "checkpoint-4"))
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(copy) == copy / "checkpoint-2"
    assert "checkpoint-4" in caplog.text and "Passed over" in caplog.text


def test_a_flipped_bit_of_the_optimiser_is_found(copy):
    file = copy / "checkpoint-4" / "optimizer.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="optimizer.bin, which is damaged"):
        expect_readable(copy / "checkpoint-4")


def test_what_only_looks_like_a_checkpoint_is_passed_over(copy, caplog):
    (copy / "checkpoint-100").write_text("a file")
    for name in ("checkpoint-abc", "checkpoint-6.unfinished", "checkpoint-²", "checkpoint-"):
        (copy / name).mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(copy) == copy / "checkpoint-4"
    for name in ("checkpoint-100", "checkpoint-abc"):
        assert f"{copy / name} is not a checkpoint: passed over" in caplog.text


def test_surplus_checkpoints_go_and_leftovers_too(copy, digits):
    (copy / "checkpoint-3.unfinished").mkdir()
    (copy / "checkpoint-3.unfinished" / "model.safetensors").write_text("half")
    resume(digits, copy, max_train_steps=6, checkpoints_total_limit=1)
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-6"]
    record = json.loads((copy / "checkpoint-6" / RECORD_NAME).read_text())
    assert record["arguments"]["max_train_steps"] == 6 and record["identity"]["images"] == 200
    assert record["files"].keys() == {file.name for file in (copy / "checkpoint-6").iterdir()} - {RECORD_NAME}
    assert TINY["batch_size"] == record["arguments"]["batch_size"]
