"""Who does what: the expert of each step of a sampling, for any scheduler of Diffusers.

    >>> scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    >>> steps_per_expert(NoiseIntervals.from_sigmas([0.875]), scheduler, 20)
    [12, 8]

A scheduler's shift changes which noise levels are visited, never who owns them.

Legend: E experts, S steps.
"""

import copy
import warnings
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import alpha_sigma, is_flow_matching
from ..diffusion.timesteps import training_timesteps
from ..intervals import NoiseIntervals
from ..models.time_argument import TimeArgument


def experts_per_step(
    intervals: NoiseIntervals, scheduler: SchedulerMixin, num_inference_steps: int | None = None, **schedule: Any
) -> list[int]:
    """
    Find the expert of each step of a sampling.

    A step of a second-order scheduler (Heun) calls the denoiser twice: each call is listed, as each is made by the expert that
    owns its noise level. [`SNRSplitPipeline`] alone lets the expert that begins such a step finish it.

    Args:
        intervals ([`NoiseIntervals`]): Which expert owns which timesteps.
        scheduler ([`SchedulerMixin`]): The pipeline's scheduler, which is not changed.
        num_inference_steps (`int`, *optional*): S. Without it and `schedule`, the steps that the scheduler is set to: those of
            the pipeline's last call.
        schedule: Further arguments of the scheduler's `set_timesteps`: `sigmas`, `timesteps`, or the `mu` of dynamic shifting.
            As in pipelines, given `sigmas` or `timesteps` decide about the number of steps.

    Returns:
        `list[int]`: The expert of each of `scheduler.timesteps`, from the noise to the image.

    Warns:
        If an expert gets none of the steps.

    Raises:
        ValueError: if the scheduler's timesteps are no training timesteps, or not as many as those of the intervals, or none
            are set.

    Example:

    ```py
    # Flux: the shift depends on the image's size
    mu = calculate_shift((height // 16) * (width // 16))  # of diffusers.pipelines.flux.pipeline_flux
    experts_per_step(intervals, pipe.scheduler, sigmas=numpy.linspace(1, 1 / 28, 28), mu=mu)
    ```
    """
    return _experts_of_steps(intervals, scheduler, num_inference_steps, schedule)


def steps_per_expert(
    intervals: NoiseIntervals, scheduler: SchedulerMixin, num_inference_steps: int | None = None, **schedule: Any
) -> list[int]:
    """
    Count the steps of each expert in a sampling.

    Args:
        intervals, scheduler, num_inference_steps, schedule: As in [`experts_per_step`].

    Returns:
        `list[int]` of length E.

    Warns:
        If an expert gets none of the steps.

    Raises:
        ValueError: as [`experts_per_step`].
    """
    experts = _experts_of_steps(intervals, scheduler, num_inference_steps, schedule)
    return [experts.count(expert) for expert in range(intervals.num_experts)]


def experts_at(intervals: NoiseIntervals, timesteps: torch.Tensor) -> torch.Tensor:
    """
    Find the experts at exact timesteps as denoisers find them: a boundary that float32 misses by its last digits is one.

    Args:
        intervals ([`NoiseIntervals`]): Which expert owns which timesteps.
        timesteps (`torch.Tensor` of shape (S,)): Training timesteps, in [0, T].

    Returns:
        `torch.LongTensor` of shape (S,).
    """
    edges = torch.tensor(intervals.edges, dtype=torch.float64)
    return intervals.index(TimeArgument().timesteps(timesteps, intervals.num_train_timesteps, edges))


def set_copy(scheduler: Any, num_inference_steps: int | None = None, **schedule: Any) -> Any:
    """
    Copy a scheduler and set the copy's timesteps.

    Args:
        scheduler, num_inference_steps, schedule: As in [`experts_per_step`].

    Raises:
        ValueError: if no timesteps are chosen or set.
    """
    while hasattr(scheduler, "around"):  # a guided one, whose experts are not copied
        scheduler = scheduler.scheduler
    scheduler = copy.deepcopy(scheduler)
    if any(schedule.get(name) is not None for name in ("sigmas", "timesteps")):
        scheduler.set_timesteps(**schedule)
    elif num_inference_steps is not None:
        scheduler.set_timesteps(num_inference_steps, **schedule)
    elif schedule or getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            f"Expected `num_inference_steps`, or a scheduler whose timesteps are set, but got a {type(scheduler).__name__} "
            "that has made no steps."
        )
    return scheduler


def _experts_of_steps(
    intervals: NoiseIntervals, scheduler: Any, num_inference_steps: int | None, schedule: dict[str, Any]
) -> list[int]:
    scheduler = set_copy(scheduler, num_inference_steps, **schedule)
    experts = experts_at(intervals, training_timesteps(scheduler, intervals.num_train_timesteps)).tolist()
    _warn_of_idle_experts(experts, intervals, scheduler)
    return experts


def _warn_of_idle_experts(experts: list[int], intervals: NoiseIntervals, scheduler: Any) -> None:
    """Say which experts get no step, which noise is theirs, and what would help."""
    idle = [expert for expert in range(intervals.num_experts) if expert not in experts]
    if not idle:
        return
    owned = []
    for expert in idle:
        low, high = intervals.edges[expert : expert + 2]
        lowest, highest = _sigmas([low, high], intervals.num_train_timesteps, scheduler)
        owned.append(f"expert {expert} (t from {low:g} to {high:g}, σ from {lowest:.4g} to {highest:.4g})")
    cures = "more steps or other boundaries"
    if is_flow_matching(scheduler):
        # a larger shift moves steps to where there is much noise
        shift = "larger" if idle[0] > sum(experts) / len(experts) else "smaller"
        cures = f"more steps, a {shift} shift or other boundaries"
    warnings.warn(
        f"Expected every expert to make some of the {len(experts)} steps of {type(scheduler).__name__}, but got none for "
        f"{', '.join(owned)}; {cures} would help.",
        stacklevel=4,  # the call of the public function
    )


def _sigmas(timesteps: list[float], num_train_timesteps: int, scheduler: Any) -> list[float]:
    """σ at timesteps; at T, that of T - 1 if the scheduler has a table."""
    if is_flow_matching(scheduler):
        return [timestep / num_train_timesteps for timestep in timesteps]
    sigmas = alpha_sigma(scheduler.alphas_cumprod.cpu())[1]
    return [float(sigmas[min(int(timestep), num_train_timesteps - 1)]) for timestep in timesteps]
