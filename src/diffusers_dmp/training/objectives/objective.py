"""What every objective of a training has: a noise process and a loss.

Legend: B batch; the other dimensions of a sample are its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from diffusers import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import nn

from ...intervals import NoiseIntervals
from .noising import Noising
from .timesteps import StepExperts, evenly_spread, owners_of_samples


@dataclass(frozen=True)
class NoisedBatch:
    """
    A batch and the noise that was added to it.

    Args:
        x0 (`torch.Tensor` of shape (B, …)): The clean samples.
        noise (`torch.Tensor` of shape (B, …)): ε.
        timesteps (`torch.Tensor` of shape (B,)): The noise levels, as [`Objective.sample_timesteps`] returns them.
        columns (`dict[str, torch.Tensor]`): Further columns of the batch, such as `class_labels` (B,).
    """

    x0: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    columns: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ObjectiveOutput(BaseOutput):
    """
    The loss of a batch.

    Args:
        loss (`torch.Tensor` of shape ()): The loss to call `backward` on.
        sample_losses (`torch.Tensor` of shape (B,)): The loss of each sample.
    """

    loss: torch.Tensor
    # None for a moment only: in mixed precision Accelerate rebuilds an output from a dictionary, as its first argument
    sample_losses: torch.Tensor = None  # type: ignore[assignment]


class Objective(nn.Module):
    """
    The noise process and the loss of a training; a subclass implements `forward`.

    The process is a [`Noising`] of its own, so that any loss goes with any noise. An objective with yet another process
    overrides [`sample_timesteps`], [`evenly_spaced_timesteps`] and [`add_noise`].

    Args:
        noising ([`Noising`] or [`SchedulerMixin`]): How samples are noised; a Diffusers scheduler alone is that at whole
            timesteps. Its scheduler is saved for sampling.
    """

    learning_rate: float | None = None  # of the parameters that the objective itself learns, if it has any

    def __init__(self, noising: Noising | SchedulerMixin):
        super().__init__()
        self.noising = noising if isinstance(noising, Noising) else Noising(noising)
        # the intervals that every batch is spread over evenly
        self.train_intervals = NoiseIntervals.uniform(1, self.noising.num_train_timesteps)

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler with this noise."""
        return self.noising.scheduler

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator,
        experts: StepExperts | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """
        Sample the timesteps of one optimiser step.

        Args:
            batch_size (`int`): B.
            generator (`torch.Generator`): Its device is the result's.
            experts ([`StepExperts`], *optional*): The experts that the step trains, whose intervals the timesteps are from;
                by default the timesteps are spread evenly over `train_intervals`.
            sample_shape (`tuple[int, ...]`, *optional*): The shape of a sample without the batch, which may decide how often
                which noise level is trained.

        Returns:
            `torch.Tensor` of shape (B,): integer steps, or for flow matching float32.

        Raises:
            ValueError: if an interval has no timesteps, or B is not divisible by the number of `train_intervals`.
        """
        if experts is None:
            intervals = self.train_intervals
            owners = evenly_spread(intervals.num_experts, batch_size)
        else:
            intervals = experts.intervals
            owners = owners_of_samples(experts.owners, batch_size)
        return self.noising.sample_timesteps(intervals, owners, generator, sample_shape)

    def check_experts(self, intervals: NoiseIntervals, experts: Iterable[int], by_density: bool = False) -> None:
        """
        Check, before the first step, that experts have noise levels to train on.

        Args:
            intervals ([`NoiseIntervals`]): The intervals of all experts.
            experts (`Iterable[int]`): Those that are trained.
            by_density (`bool`): Whether they get the samples that come without `experts`, instead of samples of their own.

        Raises:
            ValueError: if one has none.
        """
        self.noising.check_experts(intervals, experts, by_density)

    def evenly_spaced_timesteps(self, count: int, low: float, high: float) -> torch.Tensor:
        """
        Timesteps that cover [low, high) evenly, in ascending order.

        Returns:
            `torch.Tensor` of shape (count,), on the CPU.
        """
        return self.noising.evenly_spaced_timesteps(count, low, high)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noisy samples x_t (B, …) that the model sees; see [`Noising.add_noise`]."""
        return self.noising.add_noise(x0, noise, timesteps)

    def forward(self, model_output: torch.Tensor, batch: NoisedBatch) -> ObjectiveOutput:
        """
        The loss of a batch.

        Args:
            model_output (`torch.Tensor` of shape (B, …)): What the model makes of x_t.
            batch ([`NoisedBatch`]): What x_t is made of.
        """
        raise NotImplementedError
