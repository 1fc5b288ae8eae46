"""Losses and weights that are not finite end a training before anything of them is saved."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from .loop import TrainingStep

REMEDIES = "What helps: a lower `--learning_rate`, `--max_grad_norm 1`, or `--mixed_precision no`"
NOTHING_SAVED = "nothing was saved after that, and `--resume_from_checkpoint latest` goes on from before"


class FiniteCheck:
    """
    Remembers the first loss that is not finite, on the device, until somebody asks: no step waits for the device.

    Args:
        accelerator (`Accelerator`): Of all processes.
        num_train_timesteps (`int`): T, to say how noisy the samples of that loss were.
    """

    def __init__(self, accelerator: Accelerator, num_train_timesteps: int):
        self.accelerator = accelerator
        self.num_train_timesteps = num_train_timesteps
        self.learning_rates: dict[int, float] = {}  # of the steps since somebody asked
        # step, timestep and loss; step -1 as long as all losses are finite
        self.first = torch.tensor([-1.0, -1.0, 0.0], device=accelerator.device)

    def add(self, done: TrainingStep, learning_rate: float) -> None:
        """Look at the losses of a step."""
        self.learning_rates[done.step] = learning_rate
        finite = done.sample_losses.isfinite()
        others = torch.stack([done.loss, *done.auxiliary_losses.values()]).float()
        first_sample = finite.logical_not().int().argmax()[None]  # the first one, if all are finite
        values = [done.timesteps.index_select(0, first_sample), done.sample_losses.index_select(0, first_sample)]
        found = torch.cat([torch.full_like(self.first[:1], done.step), *(value.float() for value in values)])
        is_new = (self.first[0] < 0) & ~(finite.all() & others.isfinite().all())
        self.first = torch.where(is_new, found, self.first)

    def expect_finite_losses(self) -> None:
        """
        Check all losses since the last time; every process has to call.

        Raises:
            ValueError: if one was not finite: with its step, learning rate, precision and noise level.
        """
        firsts = self.accelerator.gather(self.first[None]).tolist()  # (processes, 3)
        found = [first for first in firsts if first[0] >= 0]
        if found:
            step, timestep, loss = min(found)
            precision = self.accelerator.mixed_precision.replace("no", "float32")
            raise ValueError(
                f"Expected the loss to be finite, but got {loss} in step {int(step)} (learning rate "
                f"{self.learning_rates[int(step)]:g}, {precision}, at timestep {timestep:g} of {self.num_train_timesteps}); "
                f"{NOTHING_SAVED}. {REMEDIES}."
            )
        self.learning_rates.clear()

    def expect_finite_weights(self, weights: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """
        Check weights before they are saved.

        Args:
            weights (`Iterable`): Tensors and their names.
            step (`int`): The number of steps done.

        Raises:
            ValueError: if one has a value that is not finite.
        """
        names, tensors = zip(*weights)
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors])
        if not finite.all():
            first = names[finite.tolist().index(False)]
            raise ValueError(
                f"Expected the weights to be finite, but got others in {first!r} after step {step}; {NOTHING_SAVED}. "
                f"{REMEDIES}."
            )
