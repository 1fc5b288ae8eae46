"""The scheduler of one call: which timesteps it visits, what it is given, and which denoiser makes each of its steps.

Learned variance: https://arxiv.org/abs/2102.09672. Legend: S denoising steps.
"""

import inspect
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.timesteps import check_timesteps, check_train_timesteps
from ..intervals import NoiseIntervals

LEARNED_VARIANCES = ("learned", "learned_range")


def prepare_scheduler(scheduler: SchedulerMixin, denoisers: list[ModelMixin]) -> tuple[SchedulerMixin, bool]:
    """
    Choose whether a scheduler is given the denoisers' variance channels.

    Only the DDPM schedulers use a learned variance. Others get the prediction alone.

    Args:
        scheduler ([`SchedulerMixin`]): The pipeline's scheduler.
        denoisers (`list[ModelMixin]`): The pipeline's denoisers.

    Returns:
        The scheduler to use, and whether it is given the variance channels.

    Raises:
        ValueError: if the scheduler wants a learned variance, but a denoiser has no variance channels.
    """
    if scheduler.config.get("variance_type") not in LEARNED_VARIANCES:
        return scheduler, False
    if not isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        # with a learned variance, the DPM-Solver family would use only the first 3 channels of the prediction
        return _with_settings(scheduler, variance_type=None), False
    for config in (denoiser.config for denoiser in denoisers):
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"Expected the scheduler's `variance_type` to be a fixed one for a model of {config.in_channels} input "
                f"and {config.out_channels} output channels, but got {scheduler.config.variance_type!r}."
            )
    return scheduler, True


def set_timesteps(
    scheduler: SchedulerMixin,
    denoisers: list[ModelMixin],
    num_inference_steps: int,
    timesteps: list[int] | None,
    device: torch.device | str,
) -> None:
    """
    Set a scheduler's timesteps, and check that the denoisers know them.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        denoisers (`list[ModelMixin]`): The pipeline's denoisers.
        num_inference_steps (`int`): S, if `timesteps` is None.
        timesteps (`list[int]`, *optional*): Descending timesteps.
        device: Where the scheduler keeps them.

    Raises:
        ValueError: if the scheduler takes no `timesteps`, or was made for other training timesteps than a denoiser.
    """
    num_train_timesteps = None
    for denoiser in denoisers:
        if denoiser.config.get("num_train_timesteps") is not None:
            num_train_timesteps = denoiser.config.num_train_timesteps
            check_train_timesteps(scheduler, num_train_timesteps)
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=device)
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=timesteps, device=device)
    else:
        raise ValueError(
            f"Expected a scheduler that takes `timesteps`, but got a {type(scheduler).__name__}, which does not."
        )
    if num_train_timesteps is not None:
        check_timesteps(scheduler.timesteps.cpu(), num_train_timesteps)  # once, not at every step


def step_arguments(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """Return those of `generator` and `eta` (η of DDIM) that the scheduler's `step` takes."""
    parameters = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in parameters}


def owners_of_steps(scheduler: SchedulerMixin, intervals: NoiseIntervals | None) -> list[int]:
    """
    Find the denoiser that makes each step.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set.
        intervals ([`NoiseIntervals`], *optional*): Which denoiser owns which timesteps; None for a single denoiser.

    Returns:
        `list[int]` of length S: indices of denoisers.
    """
    if intervals is None:
        return [0] * len(scheduler.timesteps)
    timesteps = scheduler.timesteps.cpu()
    # a step of a second-order scheduler has two evaluations: both are made by the denoiser that owns the first
    begins = torch.arange(len(timesteps)) // scheduler.order * scheduler.order
    runge_kutta = len(getattr(scheduler, "prk_timesteps", ()))  # PNDM's first steps have four evaluations each
    begins[:runge_kutta] = torch.arange(runge_kutta) // 4 * 4
    return intervals.index(timesteps[begins]).tolist()


def _with_settings(scheduler: SchedulerMixin, **settings: Any) -> SchedulerMixin:
    """A new scheduler with other settings; a `GuidedScheduler` keeps its guidance."""
    # of a guided scheduler's class, `from_config` makes one without guidance
    return _guided_as(scheduler, type(scheduler).from_config(scheduler.config, **settings))


def _guided_as(scheduler: SchedulerMixin, unguided: SchedulerMixin) -> SchedulerMixin:
    """Put the guidance of a scheduler, and of the guided ones inside, around another."""
    if hasattr(scheduler, "around"):
        return scheduler.around(_guided_as(scheduler.scheduler, unguided))
    return unguided
