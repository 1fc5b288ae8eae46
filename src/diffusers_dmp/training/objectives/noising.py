"""How the samples of a training are noised: which noise levels come how often, and the noisy samples.

An objective has one of these beside its loss, so that any loss goes with any noise.

Legend: B batch, E experts, T training timesteps.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from diffusers import SchedulerMixin

from ...diffusion.noise import is_flow_matching, levels_at, noisy_sample
from ...intervals import NoiseIntervals
from .densities import MIN_SHARE, MIN_TRUNCATED_SHARE, NoiseDensity, owned_timesteps
from .shifts import ResolutionShift


class Noising:
    """
    The noise of a Diffusers scheduler at whole timesteps, which come equally often.

    Args:
        scheduler ([`SchedulerMixin`]): It says T, and adds the noise.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = scheduler
        self.num_train_timesteps: int = scheduler.config["num_train_timesteps"]

    def sample_timesteps(
        self,
        intervals: NoiseIntervals,
        owners: torch.Tensor,
        generator: torch.Generator,
        sample_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """
        Sample a timestep from the interval of each sample's owner.

        Args:
            intervals ([`NoiseIntervals`]): E intervals.
            owners (`torch.LongTensor` of shape (B,)): The owner of each sample, in [0, E).
            generator (`torch.Generator`): Its device is the result's.
            sample_shape (`tuple[int, ...]`, *optional*): The shape of a sample without the batch, which may decide how often
                which noise level is trained.

        Returns:
            `torch.Tensor` of shape (B,), with `intervals.index(result) == owners`: integer steps here.

        Raises:
            ValueError: if an interval has no timesteps.
        """
        return intervals.sample(owners, len(owners), generator)

    def check_experts(self, intervals: NoiseIntervals, experts: Iterable[int], by_density: bool = False) -> None:
        """
        Check, before the first step, that experts have noise levels to train on; see [`Objective.check_experts`].

        Args:
            intervals ([`NoiseIntervals`]): The intervals of all experts.
            experts (`Iterable[int]`): Those that are trained.
            by_density (`bool`): Whether they get the samples that come by themselves, instead of samples of their own.

        Raises:
            ValueError: if one has none.
        """
        for expert in experts:
            low, high = intervals.edges[expert : expert + 2]
            if math.ceil(low) == math.ceil(high):
                raise ValueError(
                    f"Expected every expert to own a whole timestep, but got [{low}, {high}) for expert {expert}."
                )

    def evenly_spaced_timesteps(self, count: int, low: float, high: float) -> torch.Tensor:
        """
        Timesteps that cover [low, high) evenly, in ascending order.

        Returns:
            `torch.Tensor` of shape (count,), on the CPU.
        """
        first, end = math.ceil(low), math.ceil(high)
        return first + torch.arange(count) * (end - first) // count

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The noisy samples x_t that the model sees.

        Args:
            x0 (`torch.Tensor` of shape (B, …)): The clean samples.
            noise (`torch.Tensor` of shape (B, …)): ε.
            timesteps (`torch.Tensor` of shape (B,)): As [`sample_timesteps`] returns them.
        """
        return self.scheduler.add_noise(x0, noise, timesteps)


class FlowNoising(Noising):
    """
    The noise of flow matching, x_t = (1-σ)·x0 + σ·ε with t = σ·T, at noise levels from a density.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler: a `FlowMatchEulerDiscreteScheduler`, or another one with
            `use_flow_sigmas`. It says T; its own shift is for sampling.
        density ([`NoiseDensity`], *optional*): Which noise levels come how often; by default all equally.
        resolution_shift ([`ResolutionShift`], *optional*): Shifts the density by the shape of the samples, instead of
            `density.shift`.

    Raises:
        ValueError: if the scheduler is of another process.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        density: NoiseDensity | None = None,
        resolution_shift: ResolutionShift | None = None,
    ):
        super().__init__(scheduler)
        if not is_flow_matching(scheduler):
            raise ValueError(
                f"Expected a flow-matching `scheduler`, such as a FlowMatchEulerDiscreteScheduler, but got a "
                f"{type(scheduler).__name__} without flow sigmas."
            )
        self.density = density or NoiseDensity()
        self.resolution_shift = resolution_shift

    def sample_timesteps(
        self,
        intervals: NoiseIntervals,
        owners: torch.Tensor,
        generator: torch.Generator,
        sample_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """
        Sample timesteps from the density, truncated to the interval of each sample's owner; see [`Noising.sample_timesteps`].

        Returns:
            `torch.Tensor` of shape (B,), float32: t = σ·T in [0, T].

        Raises:
            ValueError: if an interval has no probability.
        """
        return self.density_for(sample_shape).sample(intervals, owners, generator)

    def density_for(self, sample_shape: tuple[int, ...] | None = None) -> NoiseDensity:
        """
        Return the density for samples of one shape.

        Args:
            sample_shape (`tuple[int, ...]`): (C, …), which only a shift by resolution reads.

        Raises:
            ValueError: if there is a shift by resolution, but no shape.
        """
        if self.resolution_shift is None:
            return self.density
        if sample_shape is None:
            raise ValueError("Expected `sample_shape` for a shift by resolution, but got None.")
        return dataclasses.replace(self.density, shift=self.resolution_shift(sample_shape))

    def check_experts(self, intervals: NoiseIntervals, experts: Iterable[int], by_density: bool = False) -> None:
        """
        Check, before the first step, that experts have probability; see [`Objective.check_experts`].

        Args:
            intervals ([`NoiseIntervals`]): The intervals of all experts.
            experts (`Iterable[int]`): Those that are trained.
            by_density (`bool`): Whether they get the samples that the whole density brings. Then 10⁻⁴ is the least share.

        Raises:
            ValueError: if one has too little; its interval and share are named. See [`NoiseDensity.check_shares`].
        """
        densities = [self.density]
        if self.resolution_shift is not None:
            densities = [dataclasses.replace(self.density, shift=shift) for shift in self.resolution_shift.range]
        for density in densities:
            density.check_shares(intervals, experts, MIN_SHARE if by_density else MIN_TRUNCATED_SHARE)

    def evenly_spaced_timesteps(self, count: int, low: float, high: float) -> torch.Tensor:
        """
        Timesteps in the middle of equal parts of [low, high), in ascending order.

        Returns:
            `torch.Tensor` of shape (count,), float32, on the CPU.
        """
        middles = low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)
        return middles.float().clamp(*owned_timesteps(low, high, self.num_train_timesteps))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The noisy samples x_t = (1-σ)·x0 + σ·ε; see [`Noising.add_noise`].

        Diffusers' `scale_noise` looks its timesteps up in the schedule of a sampling; here they are any.
        """
        alpha, sigma = (level.view(-1, *[1] * (x0.ndim - 1)) for level in levels_at(self.scheduler, timesteps))
        return noisy_sample(x0, noise, alpha, sigma)
