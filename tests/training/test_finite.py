"""A loss or a weight that is not finite ends a training, before anything of it is saved."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.checkpoints import checkpoints, expect_readable
from diffusers_dmp.training.finite import FiniteCheck
from diffusers_dmp.training.loop import TrainingStep
from diffusers_dmp.training.metrics_file import MetricsFile


def step(number: int, losses: list[float], timesteps: list[int], **auxiliary: float) -> TrainingStep:
    sample_losses = torch.tensor(losses)
    return TrainingStep(
        step=number, loss=sample_losses.mean(), sample_losses=sample_losses, timesteps=torch.tensor(timesteps),
        grad_norm=None, auxiliary_losses={name: torch.tensor(value) for name, value in auxiliary.items()}, experts=None,
    )  # fmt: skip


@pytest.fixture
def check(tmp_path) -> FiniteCheck:
    return FiniteCheck(Accelerator(cpu=True), DiTTrainingArguments(output_dir=str(tmp_path)), 1000)


def test_the_first_loss_that_is_not_finite_is_named(check):
    check.add(step(7, [1.0, 2.0], [3, 4]), 0.1)
    check.expect_finite_losses()
    check.add(step(8, [1.0, float("nan")], [30, 873]), 0.2)
    check.add(step(9, [float("inf"), 1.0], [5, 6]), 0.3)
    message = r"got nan in step 8 \(learning rate 0.2, float32, at timestep 873 of 1000\).*--max_grad_norm"
    with pytest.raises(ValueError, match=message):
        check.expect_finite_losses()


def test_auxiliary_losses_count(check):
    check.add(step(1, [1.0], [3], importance_loss=float("inf")), 0.1)
    message = r"Expected the importance loss to be finite, but got inf in step 1 \(learning rate 0.1, float32\);"
    with pytest.raises(ValueError, match=message):
        check.expect_finite_losses()


def test_the_sum_counts_although_each_loss_is_finite(check):
    done = step(1, [1.0], [3], load_loss=1.0)
    done.loss = torch.tensor(torch.inf)
    check.add(done, 0.1)
    with pytest.raises(ValueError, match=r"Expected the loss to be finite, but got inf in step 1 \(.*float32\);"):
        check.expect_finite_losses()


def test_what_helps_is_not_what_is_done_or_there_already(tmp_path):
    def message(**arguments) -> str:
        args = DiTTrainingArguments(output_dir=str(tmp_path), **arguments)
        check = FiniteCheck(Accelerator(cpu=True), args, 1000)
        with pytest.raises(ValueError) as found:
            check.expect_finite_weights([("x", torch.tensor(torch.nan))], 5)
        return str(found.value)

    said = message()
    assert "no earlier checkpoint" in said and "`--resume" not in said and "--mixed_precision" not in said
    assert said.endswith("What helps: a lower `--learning_rate`, or `--max_grad_norm 1`.")
    (tmp_path / "checkpoint-4").mkdir()
    said = message(max_grad_norm=1.0)
    assert "`--resume_from_checkpoint latest` goes on from checkpoint-4. " in said
    assert said.endswith("What helps: a lower `--learning_rate`.")
    (tmp_path / "checkpoint-6").mkdir()  # of a run that was gone back in
    assert f"`--resume_from_checkpoint {tmp_path / 'checkpoint-4'}` goes on" in message()


def test_weights_that_are_nan_are_not_validated(digits, tmp_path):
    """The step that makes them has a finite loss."""
    with pytest.raises(ValueError, match="weights to be finite.*after step 1"):
        train_here(DiTModel, digits, tmp_path, learning_rate=float("inf"), max_train_steps=4, checkpointing_steps=100,
                   validation_dataset=str(digits), validation_steps=1)  # fmt: skip
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_metrics_are_json(tmp_path):
    """The norm of the gradients may be infinite in fp16, where the scale of the loss is then lowered."""
    MetricsFile(tmp_path / "metrics.jsonl", 0).add(1, {"loss": 1.0, "grad_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0, "grad_norm": null}\n'


def test_weights_are_named(check):
    weights = {"good": torch.ones(2), "bad": torch.tensor([1.0, torch.inf]), "worse": torch.tensor(torch.nan)}
    with pytest.raises(ValueError, match="finite, but got others in 'bad' after step 5"):
        check.expect_finite_weights(weights.items(), 5)


def test_a_diverging_training_ends_and_keeps_its_good_checkpoint(digits, tmp_path):
    """Checkpoints are due after every step, and only one is kept: the good one must not give way to NaN."""
    settings = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "logging_steps": 100, "pipeline_steps": 1}
    train_here(DiTModel, digits, tmp_path, **settings, max_train_steps=2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="finite, but got .* step [34]"):
        train_here(
            DiTModel, digits, tmp_path, **settings, max_train_steps=10, resume_from_checkpoint="latest",
            learning_rate=1e38,
        )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    (checkpoint,) = checkpoints(tmp_path)
    expect_readable(checkpoint)


def test_a_training_that_logs_and_saves_at_its_end_only_saves_no_nan(digits, tmp_path):
    with pytest.raises(ValueError, match="loss to be finite"):
        train_here(DiTModel, digits, tmp_path, learning_rate=1e38, max_train_steps=4, logging_steps=100,
                   checkpointing_steps=100)  # fmt: skip
    assert not list(tmp_path.rglob("*.safetensors"))


def test_nan_in_the_last_step_alone_is_met_in_the_weights(digits, tmp_path):
    with pytest.raises(ValueError, match="weights to be finite.*after step 1"):
        train_here(DiTModel, digits, tmp_path, learning_rate=float("inf"), max_train_steps=1, checkpointing_steps=100)
    assert not (tmp_path / "pipeline").exists()
