"""Noise levels: how much of the image and how much noise a noisy sample x_t contains.

x_t = α·x0 + σ·ε, with α² + σ² = 1 for DDPM (https://arxiv.org/abs/2006.11239) and α + σ = 1 for flow matching
(https://arxiv.org/abs/2210.02747).

Legend: B batch.
"""

import functools
import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

_FLOW_CLASSES = ("FlowMatch", "FlowMapEuler", "EulerAncestralRF")  # parts of their names


def alpha_sigma(alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute α = √ᾱ and σ = √(1 - ᾱ) (DDPM, equation 4).

    Args:
        alphas_cumprod (`torch.Tensor` of any shape): ᾱ, in [0, 1].

    Returns:
        α and σ, in the shape and dtype of `alphas_cumprod`.
    """
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def angles_at(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """
    Compute the angle arctan(σ/α) of timesteps, also between the whole ones: from 0 (image) to π/2 (noise).

    It says the same as the signal-to-noise ratio, cot² of it, and is finite at ᾱ = 0.

    Args:
        alphas_cumprod (`torch.Tensor` of shape (T,)): ᾱ at each training timestep.
        timesteps (`torch.Tensor` of any shape): t in [0, T - 1], on the CPU.

    Returns:
        `torch.Tensor` of the shape of `timesteps`, in float64, on the CPU.
    """
    alphas, sigmas = alpha_sigma(alphas_cumprod.cpu().double())
    table, timesteps = torch.atan2(sigmas, alphas), timesteps.double()
    low = timesteps.floor().long().clamp(max=len(table) - 1)
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], timesteps - low)


def signal_to_noise_ratio(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """
    Compute the signal-to-noise ratio α²/σ² = ᾱ/(1 - ᾱ).

    Args:
        alphas_cumprod (`torch.Tensor` of any shape): ᾱ, in [0, 1].

    Returns:
        The ratios, in the shape and dtype of `alphas_cumprod`.
    """
    return alphas_cumprod / (1 - alphas_cumprod)


def flow_signal_to_noise_ratio(sigma: torch.Tensor) -> torch.Tensor:
    """
    Compute the signal-to-noise ratio ((1 - σ) / σ)² of flow matching.

    Args:
        sigma (`torch.Tensor` of any shape): σ, in [0, 1].

    Returns:
        The ratios, in the shape and dtype of `sigma`.
    """
    return ((1 - sigma) / sigma) ** 2


def levels_at(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute α and σ at training timesteps: σ = t/T and α = 1 - σ for flow matching, those of ᾱ otherwise.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler, or one with `alphas_cumprod`.
        timesteps (`torch.Tensor` of any shape): t in [0, T]; whole numbers below T if the scheduler has `alphas_cumprod`.

    Returns:
        α and σ in float32, in the shape and on the device of `timesteps`.
    """
    if is_flow_matching(scheduler):
        sigma = (timesteps / scheduler.config["num_train_timesteps"]).float()
        return 1 - sigma, sigma
    return alpha_sigma(scheduler.alphas_cumprod.to(timesteps.device)[timesteps.long()])


def noisy_sample(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    Add noise to clean samples: x_t = α·x0 + σ·ε.

    Args:
        x0 (`torch.Tensor` of shape (B, …)): The clean samples.
        noise (`torch.Tensor` of shape (B, …)): ε.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ.

    Returns:
        `torch.Tensor` of shape (B, …).
    """
    return alpha * x0 + sigma * noise


def are_same_levels(alphas_cumprod: torch.Tensor, others: torch.Tensor) -> bool:
    """
    Tell whether two noise schedules are the same up to rounding.

    Args:
        alphas_cumprod, others (`torch.Tensor` of shape (T,)): ᾱ at each training timestep.
    """
    if len(alphas_cumprod) != len(others):
        return False
    return torch.allclose(alphas_cumprod.cpu().double(), others.cpu().double(), rtol=1e-3, atol=1e-6)


def scheduler_setting(scheduler: SchedulerMixin, name: str) -> Any:
    """
    Return a setting that a scheduler has and uses.

    `from_config` keeps the settings of the scheduler that a configuration comes from, also those that the new class does
    not have: an `EulerDiscreteScheduler` may have `clip_sample` in its configuration, but it clips nothing.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers.
        name (`str`): An argument of its class.

    Returns:
        The value in its configuration; None if its class has no such argument.
    """
    # a guided scheduler is made with other arguments than the class that it guides
    scheduler_class: Any = getattr(scheduler, "unguided_class", None) or type(scheduler)
    return scheduler.config.get(name) if name in _settings(scheduler_class) else None


@functools.cache
def _settings(scheduler_class: Any) -> set[str]:
    """The arguments of a class, and of those that it derives from."""
    bases = (each for each in scheduler_class.__mro__ if "__init__" in vars(each))
    return {name for base in bases for name in inspect.signature(vars(base)["__init__"]).parameters}


def is_flow_matching(scheduler: SchedulerMixin) -> bool:
    """
    Tell whether a scheduler's noisy samples are those of flow matching, x_t = (1-σ)·x0 + σ·ε with t = σ·T.

    Such a scheduler may have `alphas_cumprod` as well, which it does not use.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers.
    """
    classes = [each.__name__ for each in type(scheduler).__mro__]
    is_flow_class = any(name in each for name in _FLOW_CLASSES for each in classes)
    return is_flow_class or bool(scheduler_setting(scheduler, "use_flow_sigmas"))
