"""Noise processes, and where one of them has the noise level of another: at an equal signal-to-noise ratio.

Every process here is x_t = α·x0 + σ·ε. A sample of one is a sample of another after a multiplication, at the timestep where the
ratio σ/α is the same: flow matching (https://arxiv.org/abs/2210.02747) has α + σ = 1, diffusion
(https://arxiv.org/abs/2006.11239) has α² + σ² = 1.

Legend: T training timesteps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import angles_at, are_same_levels, is_flow_matching
from .noise_schedules import scheduler_of_training


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """
    A noise process: which noise a training timestep has.

    ```py
    process = NoiseProcess.from_record({"process": "flow_matching", "num_train_timesteps": 1000})
    t = process.timestep_at(alpha, sigma)          # where it has the noise of α·x0 + σ·ε
    x = process.scale_at(alpha, sigma) * x_t       # which then is a sample of this process
    ```

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler with this noise: a flow-matching one, or one with `alphas_cumprod`.
    """

    scheduler: SchedulerMixin

    @classmethod
    def from_record(cls, noise_schedule: "dict[str, Any]") -> "NoiseProcess":
        """
        Make the process of a record.

        Args:
            noise_schedule (`dict`): See [`noise_schedule_of`]; the `prediction_type` may be missing, and so may `process` for
                diffusion.

        Raises:
            ValueError: if it is no such record.
        """
        defaults = {"process": "diffusion", "prediction_type": "epsilon"}  # the latter is of no use here
        return cls(scheduler_of_training(defaults | dict(noise_schedule)))

    @property
    def is_flow_matching(self) -> bool:
        """Whether α + σ = 1, instead of α² + σ² = 1."""
        return is_flow_matching(self.scheduler)

    @property
    def num_train_timesteps(self) -> int:
        """The number of training timesteps T."""
        return self.scheduler.config["num_train_timesteps"]

    def is_process_of(self, scheduler: SchedulerMixin) -> bool:
        """
        Tell whether a scheduler has this noise at every timestep, up to rounding.

        Args:
            scheduler ([`SchedulerMixin`]): A flow-matching scheduler, or one with `alphas_cumprod`.
        """
        if is_flow_matching(scheduler) != self.is_flow_matching:
            return False
        if self.is_flow_matching:
            return scheduler.config.get("num_train_timesteps") in (
                self.num_train_timesteps,
                1,
            )  # 1: counted from 0 to 1
        levels = self.scheduler.alphas_cumprod
        if scheduler.config.get("model_train_timesteps") == self.num_train_timesteps:
            levels = levels[: len(scheduler.alphas_cumprod)]  # it has only the first of them: see `without_pure_noise`
        return are_same_levels(levels, scheduler.alphas_cumprod)

    def levels_at(self, timesteps: torch.Tensor) -> "tuple[torch.Tensor, torch.Tensor]":
        """
        Compute α and σ of training timesteps.

        Args:
            timesteps (`torch.Tensor` of any shape): t in [0, T], which need not be whole numbers, on the CPU.

        Returns:
            α and σ, in the shape of `timesteps`, in float64.
        """
        if self.is_flow_matching:
            sigmas = timesteps.double() / self.num_train_timesteps
            return 1 - sigmas, sigmas
        angles = angles_at(self.scheduler.alphas_cumprod, timesteps)
        return angles.cos(), angles.sin()

    def timestep_at(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Find the timestep with the noise level of α·x0 + σ·ε; if there is none, the first or the last one.

        Args:
            alpha, sigma (`torch.Tensor` of any shape): α and σ of any process, on the CPU.

        Returns:
            `torch.Tensor` of the same shape, in float64: timesteps in [0, T], which need not be whole numbers.
        """
        alpha, sigma = alpha.double(), sigma.double()
        if self.is_flow_matching:
            return sigma / (alpha + sigma) * self.num_train_timesteps
        table = angles_at(self.scheduler.alphas_cumprod, torch.arange(self.num_train_timesteps))
        angle = torch.atan2(sigma, alpha).clamp(table[0], table[-1])
        high = torch.searchsorted(table, angle).clamp(min=1)
        low = high - 1
        return low + (angle - table[low]) / (table[high] - table[low])

    def scale_at(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Return the number by which α·x0 + σ·ε is multiplied to be a sample of this process.

        Args:
            alpha, sigma (`torch.Tensor` of any shape): α and σ of any process.

        Returns:
            `torch.Tensor` of the same shape, in float64.
        """
        alpha, sigma = alpha.double(), sigma.double()
        return 1 / (alpha + sigma) if self.is_flow_matching else 1 / torch.hypot(alpha, sigma)
