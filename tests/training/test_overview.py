"""What a training says before its first step, and what it logs and keeps while it runs."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training import run as training_run
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.best_checkpoint import BestCheckpoint
from diffusers_dmp.training.metrics_file import MetricsFile, read_metrics

LONG = {"max_train_steps": 12, "logging_steps": 5, "checkpointing_steps": 6, "sample_inference_steps": 2}


def train(digits: Path, output_dir: Path, **arguments) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(DiTModel, digits, output_dir, **LONG | arguments)


@pytest.fixture(scope="module")
def validated_run(digits, tmp_path_factory) -> tuple[Path, str]:
    """Twelve steps that are validated every four, with losses that are lowest in the middle; and what they printed."""
    output_dir = tmp_path_factory.mktemp("validated")
    measured = training_run.validation_losses
    losses = {8: 0.0}  # instead of the measured one, so that step 8 is the best

    def validation_losses(parts, args, data):
        found = measured(parts, args, data)
        step = parts.lr_scheduler.last_epoch
        return found | {"validation_loss": losses.get(step, found["validation_loss"])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "validation_losses", validation_losses)
        train(digits, output_dir, validation_dataset=str(digits), validation_steps=4, checkpoints_total_limit=1)
    return output_dir


def test_a_training_says_what_it_will_do(digits, tmp_path, capfd):
    train(digits, tmp_path, validation_dataset=str(digits), validation_steps=6, gradient_accumulation_steps=2)
    out, err = capfd.readouterr()
    assert err.count("200 images, 10 classes: 0 20, ") == 2 and "classes" not in out  # said once of each data set
    lines = out.splitlines()
    *lines, result, losses = lines
    said = {line.split(":")[0]: line.split(":", 1)[1].strip() for line in lines}
    assert said["data"] == f"{digits}: 200 images"
    assert said["validation"] == f"{digits}: 200 images; before, every 6 steps and after"
    num_parameters = sum(tensor.numel() for tensor in weights(tmp_path).values())
    assert said["model"] == f"DiTModel, {num_parameters:,} parameters, all of them trained"
    assert said["steps"] == (
        "12 of 16 images (2 accumulation steps x 8); 0.96 epochs of 200 images; adamw, constant learning rate 0.001"
    )
    assert said["device"].startswith("cpu (") and said["device"].endswith("), 32 bits")
    assert said["output"] == (
        f"{tmp_path}: checkpoints every 6 steps and at the end (the last 2 and the best kept), metrics.jsonl, the finished pipeline"
    )
    assert result.split() == ["result:", str(tmp_path / "pipeline")]
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    first, last = (summary[when]["validation_loss"] for when in ("before", "after"))
    assert losses.split(":", 1)[1].strip() == f"loss {first:.4f} → {last:.4f}"
    assert lines[-1].startswith("After step 10 of 12: about ") and lines[-1].endswith(" s to go.")


def test_metrics_of_a_run(validated_run):
    rows = {row["step"]: row for row in read_metrics(validated_run / "metrics.jsonl")}
    assert list(rows) == [1, 4, 5, 8, 10, 12]  # the first, every fifth, every fourth for validation, the last
    assert all({"loss", "lr", "images_per_second"} <= rows[step].keys() for step in (1, 5, 10, 12))
    assert rows[4].keys() == {"step", "validation_loss"} and "validation_loss" in rows[12].keys() - rows[10].keys()
    assert rows[1]["loss"] == pytest.approx(1.0, abs=0.2)  # a new model predicts nothing of the noise
    summary = json.loads((validated_run / "training_summary.json").read_text())
    assert rows[12]["validation_loss"] == pytest.approx(summary["after"]["validation_loss"], rel=1e-6)


def test_the_best_checkpoint_is_kept(validated_run):
    """Beside the last one, although the limit is one."""
    assert sorted(path.name for path in validated_run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    best = json.loads((validated_run / "best_checkpoint.json").read_text())
    assert best.pop("validation").items() >= {"images": 200, "split": "train", "repeats": 1}.items()
    assert best == {"checkpoint": "checkpoint-8", "step": 8, "validation_loss": 0.0}


def test_a_best_of_other_images_is_forgotten(tmp_path, caplog):
    """Their losses do not compare, and one that is never reached again would stay the best for ever."""
    (tmp_path / "checkpoint-4").mkdir()
    best = BestCheckpoint(tmp_path, 0, {"images": 10})
    best.add(4, 0.1)
    best.save()
    with caplog.at_level(logging.WARNING):
        assert BestCheckpoint(tmp_path, 8, {"images": 10}).step == 4 and not caplog.text
        assert BestCheckpoint(tmp_path, 8, {"images": 20}).step is None
    assert "checkpoint-4, was validated otherwise: forgotten" in caplog.text
    assert not (tmp_path / "best_checkpoint.json").exists()


@pytest.mark.parametrize("moment", ["save_checkpoint", "BestCheckpoint.save"])
def test_a_kill_while_the_best_is_saved_leaves_a_best(digits, tmp_path, monkeypatch, moment):
    """Whether the new one is complete by then or not, although only one is kept."""
    losses = iter([2.0, 1.0, 0.5])  # before, and after steps 4 and 8
    monkeypatch.setattr(training_run, "validation_losses", lambda *arguments: {"validation_loss": next(losses)})
    owner, name = (training_run, moment) if "." not in moment else (training_run.BestCheckpoint, "save")
    save, calls = getattr(owner, name), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(*arguments)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(KeyboardInterrupt):
        train(digits, tmp_path, validation_dataset=str(digits), validation_steps=4, checkpoints_total_limit=1,
              checkpointing_steps=100)  # fmt: skip
    best = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert best["checkpoint"] == "checkpoint-4" and (tmp_path / "checkpoint-4").is_dir()


def test_validation_changes_nothing_in_the_training(validated_run, digits, tmp_path):
    train(digits, tmp_path)
    expected = weights(tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(validated_run).items())


def test_a_resumed_run_continues_its_metrics_and_knows_its_best(validated_run, digits, tmp_path):
    shutil.copytree(validated_run, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # a run that was killed while it wrote
    arguments = {"validation_dataset": str(digits), "validation_steps": 4, "checkpoints_total_limit": 1}
    train(digits, tmp_path, **arguments, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    once, twice = (read_metrics(folder / "metrics.jsonl") for folder in (validated_run, tmp_path))
    assert [row["step"] for row in twice] == [1, 4, 5, 8, 10, 12]
    assert twice[:4] == once[:4] and twice[-1]["validation_loss"] == once[-1]["validation_loss"]
    assert json.loads((tmp_path / "best_checkpoint.json").read_text())["step"] == 8
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


def test_a_run_from_the_beginning_begins_its_metrics_anew(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl", 0).add(5, {"loss": 1.0})
    MetricsFile(tmp_path / "metrics.jsonl", 0).add(1, {"loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_refuses_to_validate_on_nothing():
    with pytest.raises(ValueError, match="`validation_steps` to be 0 without a `validation_dataset`, but got 5"):
        DiTTrainingArguments(validation_steps=5)
    with pytest.raises(ValueError, match="`validation_steps` to be 0, for never, or more, but got -1"):
        DiTTrainingArguments(validation_steps=-1)


def test_balanced_classes_and_repeats_train(digits, tmp_path, capfd):
    train(digits, tmp_path / "plain")
    train(digits, tmp_path / "balanced", balance_classes=True)
    train(digits, tmp_path / "repeated", class_repeats=["3=5"], max_train_steps=2)
    said = [
        line.split(": ", 1)[1].strip() for line in capfd.readouterr().out.splitlines() if line.startswith("steps:")
    ]
    assert "; classes balanced;" in said[1] and "classes balanced" not in said[0]
    assert "epochs of 288 images" in said[2]  # the digit 3 has 22
    plain, balanced = weights(tmp_path / "plain"), weights(tmp_path / "balanced")
    assert any(not torch.equal(tensor, balanced[name]) for name, tensor in plain.items())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`class_repeats` to name classes of 0, 1, .*but got eleven"):
        train_here(DiTModel, digits, tmp_path / "wrong", class_repeats=["eleven=2"])
