"""Checks that timesteps lie within the training schedule that a model was made for.

Timesteps t count the T steps of the training schedule: t = 0 is almost clean, t = T - 1 almost pure noise. A flow-matching
scheduler (https://arxiv.org/abs/2210.02747) has t = σ·T and starts at exactly t = T.
"""

from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import is_flow_matching, scheduler_setting

# What float32 leaves open of a timestep, as a share of T: schedulers and pipelines order the same operations differently, and a
# flow-matching scheduler with a shift may begin at t = 1000.0002.
SINGLE_PRECISION = 32 * torch.finfo(torch.float32).eps
_SIGMAS_WITH_SAMPLES = ("LTXEulerAncestralRFScheduler",)


def check_timesteps(timesteps: torch.Tensor, num_train_timesteps: int) -> None:
    """
    Check that timesteps lie in [0, T), or, up to rounding, in [0, T] if they are floats.

    Only CPU tensors are checked: to read a tensor on an accelerator would make the CPU wait for it at every step. The
    pipelines therefore check their whole schedule once, on the CPU.

    Args:
        timesteps (`torch.Tensor` of any shape): Integer or float timesteps.
        num_train_timesteps (`int`): T.

    Raises:
        ValueError: if a timestep on the CPU lies outside.
    """
    if not timesteps.is_cpu or torch.compiler.is_compiling() or timesteps.numel() == 0:
        return
    low, high = timesteps.min(), timesteps.max()
    end = num_train_timesteps * (1 + SINGLE_PRECISION) if timesteps.is_floating_point() else num_train_timesteps - 1
    if low < 0 or high > end:
        raise ValueError(
            f"Expected `timestep` to lie within the {num_train_timesteps} training timesteps, "
            f"but got values from {low.item()} to {high.item()}."
        )


def check_train_timesteps(scheduler: SchedulerMixin, num_train_timesteps: int) -> None:
    """
    Check that a scheduler and a model have the same number of training timesteps.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        num_train_timesteps (`int`): T of the model.

    Raises:
        ValueError: if the numbers differ.
    """
    # a scheduler without the last timesteps, those of pure noise, is one for a model of all of them
    scheduler_timesteps = scheduler.config.get("model_train_timesteps") or scheduler.config.get("num_train_timesteps")
    if scheduler_timesteps != num_train_timesteps:
        raise ValueError(
            f"Expected the scheduler's `num_train_timesteps` to be the model's {num_train_timesteps}, "
            f"but got a {type(scheduler).__name__} with {scheduler_timesteps}."
        )


def counts_from_noise(scheduler: SchedulerMixin) -> bool:
    """
    Tell whether a flow-matching scheduler counts from the noise to the image, as Mochi's does.

    Its σ and timesteps are those of the image, and it steps along x0 - ε, the negative velocity.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler.
    """
    return bool(scheduler_setting(scheduler, "invert_sigmas"))


def check_counts_timesteps(scheduler: SchedulerMixin) -> None:
    """
    Check that the timesteps of a scheduler are training timesteps.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers.

    Raises:
        ValueError: if they are not, as those of EDM, or of Euler's scheduler for Stable Video Diffusion, which count ln(σ)/4.
    """
    counts = is_flow_matching(scheduler) or hasattr(scheduler, "alphas_cumprod")
    settings = tuple(scheduler_setting(scheduler, name) for name in ("timestep_type", "prediction_type"))
    if not counts or settings == ("continuous", "v_prediction"):
        raise ValueError(
            "Expected `scheduler` to count training timesteps, as those with `alphas_cumprod` and flow-matching ones do, but "
            f"got a {type(scheduler).__name__}, which has a time of its own."
        )


def training_timesteps(scheduler: SchedulerMixin, num_train_timesteps: int) -> torch.Tensor:
    """
    Return the training timestep t of each of a scheduler's steps.

    That is `scheduler.timesteps`, except that some flow-matching schedulers count from the noise to the image (Mochi's, and
    others with `invert_sigmas`), or from 0 to 1 (`num_train_timesteps=1`, as ACE-Step's).

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set.
        num_train_timesteps (`int`): T.

    Returns:
        `torch.Tensor` of shape (S,), on the CPU: integer or float timesteps, in [0, T].

    Raises:
        ValueError: see [`check_counts_timesteps`]; and if the scheduler has another number of them.
    """
    check_counts_timesteps(scheduler)
    flow = is_flow_matching(scheduler)
    timesteps = scheduler.timesteps.cpu()
    last = scheduler.config.get("num_train_timesteps")
    if flow and counts_from_noise(scheduler):
        timesteps = last - timesteps
    if flow and last == 1:
        return timesteps * num_train_timesteps
    check_train_timesteps(scheduler, num_train_timesteps)
    return timesteps


def move_sigmas_to_samples(scheduler: SchedulerMixin, device: torch.device | str | None) -> None:
    """
    Move a scheduler's σ, set on the CPU, to the samples if its `step` computes with them there.

    The other schedulers take each σ as a number, or move it themselves: on the CPU, no step waits for an accelerator to read it.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set.
        device: Where the samples are.
    """
    if type(scheduler).__name__ in _SIGMAS_WITH_SAMPLES:
        moved: Any = scheduler
        moved.sigmas = moved.sigmas.to(device)
