"""The steps of a guided scheduler: their timesteps and noise levels, as it counts them and as the experts do.

All of it is on the CPU, so that no step waits for an accelerator.

Legend: B batch, T training timesteps, S steps; the other dimensions of a sample are its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..diffusion.noise import is_flow_matching
from ..diffusion.predictions import convert_prediction, noise_levels, to_x0
from ..diffusion.process import NoiseProcess
from ..diffusion.timesteps import counts_from_noise, training_timesteps

# With a smaller α, x_t has no image to guide: at ᾱ = 0, or the 2⁻²⁴ that some schedulers replace it by.
MIN_ALPHA = 1e-3
# In flow matching, ∇log p is multiplied by σ/(1-σ), and a gradient that does not vanish where there is nothing but noise diverges.
MAX_FLOW_SIGMA = 0.95


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """
    Timesteps and noise levels of all steps.

    Args:
        timesteps (`torch.Tensor` of shape (S,)): Those of the scheduler.
        training_timesteps (`torch.Tensor` of shape (S,)): The same, counted as in training: t = σ·T for flow matching.
        alphas, sigmas (`torch.Tensor` of shape (S,)): α and σ; see [`noise_levels`].
        default_range (`tuple[float, float]`): The training timesteps that are guided if nothing else is asked for.
        moved (`torch.Tensor` of shape (S,), *optional*): The scheduler's timesteps themselves, where they are on an accelerator.
    """

    timesteps: torch.Tensor
    training_timesteps: torch.Tensor
    alphas: torch.Tensor
    sigmas: torch.Tensor
    default_range: tuple[float, float]
    moved: "torch.Tensor | None" = None
    _trained: "dict[NoiseProcess, tuple[torch.Tensor, torch.Tensor | None]]" = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, scheduler: Any, num_train_timesteps: int) -> "StepSchedule":
        """
        Read the schedule of a scheduler whose timesteps are set.

        Args:
            scheduler ([`SchedulerMixin`]): A scheduler with `alphas_cumprod`, or a flow-matching one.
            num_train_timesteps (`int`): T, for a scheduler that counts from 0 to 1.

        Raises:
            ValueError: if its noise levels are not known, or it goes from images to noise.
        """
        check_direction(scheduler)
        alphas, sigmas = noise_levels(scheduler)
        timesteps, moved, config = scheduler.timesteps.cpu(), scheduler.timesteps, scheduler.config
        if not is_flow_matching(scheduler):
            count = config.get("model_train_timesteps") or config["num_train_timesteps"]
            trained = training_timesteps(scheduler, count)
            return cls(timesteps, trained, alphas, sigmas, (0.0, float("inf")), moved)
        count = config["num_train_timesteps"]
        if count == 1:  # it counts from 0 to 1
            count = num_train_timesteps
        # t = σ·T: the scheduler's own timesteps may be rounded
        return cls(timesteps, sigmas * count, alphas, sigmas, (0.0, MAX_FLOW_SIGMA * count), moved)

    def is_of(self, scheduler: Any) -> bool:
        """Whether a scheduler still has these timesteps: others may have been set without `set_timesteps`."""
        return any(scheduler.timesteps is known for known in (self.timesteps, self.moved))

    def position_of(self, timestep: Any, scheduler: Any) -> int:
        """
        Find the step that a scheduler begins with if it is given a timestep.

        Raises:
            ValueError: if it is none of the scheduler's timesteps.
        """
        timestep = torch.as_tensor(timestep).cpu()
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        if not matches:
            raise ValueError(f"Expected `timestep` to be one of {self.timesteps.tolist()}, but got {timestep}.")
        if len(matches) == 1 or not hasattr(scheduler, "index_for_timestep"):
            return matches[0]
        return scheduler.index_for_timestep(timestep, self.timesteps)

    def can_be_guided(self, position: int) -> bool:
        """Whether there is an image to guide, and noise to guide it by."""
        return self.alphas[position].item() > MIN_ALPHA and self.sigmas[position].item() > 0

    def as_trained(self, process: "NoiseProcess | None", scheduler: Any) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """
        Where a process has the noise of each step.

        Args:
            process ([`NoiseProcess`], *optional*): That of experts' training; None if it is not known.
            scheduler ([`SchedulerMixin`]): The scheduler that takes the steps.

        Returns:
            Training timesteps (S,) of that process, and what x_t of each step is multiplied by to be a sample of it (S,), None
            if it is one already.
        """
        if process is None:
            return self.training_timesteps, None
        if process not in self._trained:
            is_flow, timesteps, scales = is_flow_matching(scheduler), self.training_timesteps, None
            if is_flow or not process.is_process_of(scheduler):
                timesteps = process.timestep_at(self.alphas, self.sigmas)
            if is_flow != process.is_flow_matching:
                scales = process.scale_at(self.alphas, self.sigmas)
            self._trained[process] = timesteps, scales
        return self._trained[process]

    @contextmanager
    def on_cpu(self, scheduler: Any) -> Iterator[None]:
        """Let a scheduler have its timesteps on the CPU within a `with` block: some read them at each step."""
        theirs = scheduler.timesteps
        scheduler.timesteps = self.timesteps
        try:
            yield
        finally:
            scheduler.timesteps = theirs


@dataclass(frozen=True)
class NoisyStep:
    """
    The input of one denoising step.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        schedule ([`StepSchedule`]): All of its steps.
        position (`int`): The index of this one.
        x_t (`torch.Tensor` of shape (B, …)): The noisy samples, α·x0 + σ·ε, in float32 or float64.
        prediction (`torch.Tensor` of shape (B, …)): The denoiser's prediction, in the same dtype.
        prediction_type (`str`): The kind of the prediction; see [`convert_prediction`].
    """

    scheduler: Any
    schedule: StepSchedule
    position: int
    x_t: torch.Tensor
    prediction: torch.Tensor
    prediction_type: str

    @property
    def timestep(self) -> torch.Tensor:
        """The training timestep (), on the CPU."""
        return self.schedule.training_timesteps[self.position]

    @property
    def alpha(self) -> torch.Tensor:
        """α of x_t, of shape (), in float64 on the CPU."""
        return self.schedule.alphas[self.position]

    @property
    def sigma(self) -> torch.Tensor:
        """σ of x_t, of shape (), in float64 on the CPU."""
        return self.schedule.sigmas[self.position]

    def as_trained(self, process: "NoiseProcess | None") -> "tuple[torch.Tensor, torch.Tensor | None]":
        """The timestep () at which a process has this noise, and what x_t is multiplied by to be a sample of it, or None."""
        timesteps, scales = self.schedule.as_trained(process, self.scheduler)
        return timesteps[self.position], None if scales is None else scales[self.position]

    def x0(self) -> torch.Tensor:
        """x̂0 (B, …) of the prediction."""
        return to_x0(self.prediction, self.x_t, self.alpha, self.sigma, self.prediction_type)

    def x0_of(self, x_t: torch.Tensor) -> torch.Tensor:
        """x̂0 (B, …) as a function of x_t, with a constant prediction; if that is x0, with constant noise."""
        prediction, kind = self.prediction.detach().clone(), self.prediction_type
        if kind == "sample":
            prediction = convert_prediction(prediction, x_t.detach(), self.alpha, self.sigma, kind, "epsilon")
            kind = "epsilon"
        return to_x0(prediction, x_t, self.alpha, self.sigma, kind)


def check_direction(scheduler: Any) -> None:
    """
    Check that a scheduler goes from noise to images.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set.

    Raises:
        ValueError: if it goes from images to noise.
    """
    timesteps = scheduler.timesteps
    ascends = is_flow_matching(scheduler) and counts_from_noise(scheduler)
    if len(timesteps) > 1 and bool(timesteps[0] < timesteps[-1]) != ascends:
        raise ValueError(
            f"Expected `scheduler` to go from noise to images, but got a {type(scheduler).__name__}, which goes back."
        )
