"""A loss or a weight that is not finite ends a training, before anything of it is saved."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import train_here, weights

from diffusers_dmp import DiTModel
from diffusers_dmp.training.checkpoints import checkpoints, expect_readable
from diffusers_dmp.training.finite import FiniteCheck
from diffusers_dmp.training.loop import TrainingStep


def step(number: int, losses: list[float], timesteps: list[int], **auxiliary: float) -> TrainingStep:
    sample_losses = torch.tensor(losses)
    return TrainingStep(
        step=number, loss=sample_losses.mean(), sample_losses=sample_losses, timesteps=torch.tensor(timesteps),
        grad_norm=None, auxiliary_losses={name: torch.tensor(value) for name, value in auxiliary.items()}, experts=None,
    )  # fmt: skip


@pytest.fixture
def check() -> FiniteCheck:
    return FiniteCheck(Accelerator(cpu=True), 1000)


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
    with pytest.raises(ValueError, match="step 1 "):
        check.expect_finite_losses()


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
