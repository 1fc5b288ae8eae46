"""The two ways to guide a step of a scheduler: in the noise, or in the mean.
https://arxiv.org/abs/2105.05233, algorithms 2 and 1

Legend: B batch, C channels; the other dimensions of a sample are its own.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import scheduler_setting
from ..diffusion.noise_schedules import clips
from ..diffusion.predictions import convert_prediction, posterior_weights
from .gradient import Guidance, per_sample
from .step_schedule import NoisyStep

# Guidance in the noise: ε - σ·s·∇log p; of a velocity of flow matching, v - s·σ/(1-σ)·∇log p


def guided_prediction(
    scheduler: SchedulerMixin, noisy: NoisyStep, model_output: torch.Tensor, guidances: list[Guidance]
) -> torch.Tensor:
    """
    Replace the noise in a denoiser's output by the guided noise.

    Args:
        scheduler ([`SchedulerMixin`]): Its configuration says whether x̂0 is clipped.
        noisy ([`NoisyStep`]): The step.
        model_output (`torch.Tensor` of shape (B, C or 2C, …)): The denoiser's output; a learned variance stays as it is.
        guidances (`list[Guidance]`): What guides, each by its gradient at x_t and the denoiser's prediction.

    Returns:
        `torch.Tensor` of shape (B, C or 2C, …): A prediction of the same type, of a clipped x̂0 if the scheduler clips.
    """
    levels, kind, prediction = (noisy.alpha, noisy.sigma), noisy.prediction_type, noisy.prediction
    if clips(scheduler):
        # As in the published code: the guided noise is that of the clipped x̂0.
        x0 = _clipped(scheduler, noisy.x0())
        prediction = convert_prediction(x0, noisy.x_t, *levels, "sample", kind)
    for guidance in guidances:
        # A prediction of another type is linear in ε and x_t together: the change is that of ε's change at x_t = 0.
        change = -noisy.sigma * guidance.scale * guidance.gradient(noisy)
        change = convert_prediction(change, torch.zeros_like(change), *levels, "epsilon", kind)
        unguided, guided = prediction.to(model_output.dtype), (prediction + change).to(model_output.dtype)
        prediction = guidance.finite_or(unguided, guided, noisy).to(noisy.x_t.dtype)
    rest = model_output[:, noisy.x_t.shape[1] :]
    return torch.cat([prediction.to(model_output.dtype), rest], dim=1)


def _clipped(scheduler: SchedulerMixin, x0: torch.Tensor) -> torch.Tensor:
    """x̂0 (B, …), clipped as the scheduler itself does it."""
    if scheduler_setting(scheduler, "thresholding"):
        return scheduler._threshold_sample(x0)
    return x0.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)


@contextmanager
def unclipped(scheduler: SchedulerMixin) -> Iterator[None]:
    """Switch a scheduler's clipping off within a `with` block."""
    switches = {name: True for name in ("thresholding", "clip_sample") if scheduler.config.get(name)}
    if not switches:
        yield
        return
    scheduler.register_to_config(**dict.fromkeys(switches, False))
    try:
        yield
    finally:
        scheduler.register_to_config(**switches)


# Guidance in the mean: μ + σ²·s·∇log p


def step_with_guided_mean(
    scheduler: SchedulerMixin,
    step: Callable,
    call: inspect.BoundArguments,
    noisy: NoisyStep,
    guidances: list[Guidance],
) -> Any:
    """
    Take a DDPM step, whose noise does not depend on its mean, and add σ²·s·∇log p to the result.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler of the DDPM kind.
        step (`Callable`): Its step without guidance.
        call (`inspect.BoundArguments`): The arguments of the step.
        noisy ([`NoisyStep`]): The same step as guidance needs it.
        guidances (`list[Guidance]`): What guides; the last one first.

    Returns:
        What `step` returns for these arguments, an output or a tuple.
    """
    return_dict = call.arguments.get("return_dict", True)
    call.arguments["return_dict"] = True
    output = step(*call.args, **call.kwargs)
    channels = noisy.x_t.shape[1]
    variance = _variance(scheduler, call.arguments["model_output"][:, channels:], int(noisy.timestep))
    for guidance in reversed(guidances):
        gradient = guidance.gradient(noisy)
        if guidance.rescale_to_mean:
            mean = _mean(scheduler, output.pred_original_sample.to(gradient.dtype), noisy)
            gradient = _rescaled(gradient, mean)
        unguided = output.prev_sample
        guided = (unguided.to(gradient.dtype) + variance * guidance.scale * gradient).to(unguided.dtype)
        output.prev_sample = guidance.finite_or(unguided, guided, noisy)
    return output if return_dict else output.to_tuple()


def _mean(scheduler: SchedulerMixin, x0: torch.Tensor, noisy: NoisyStep) -> torch.Tensor:
    """The mean (B, …) of q(x_s | x_t, x̂0), where s is the next timestep."""
    t = int(noisy.timestep)
    previous = int(scheduler.previous_timestep(t))
    alpha_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else torch.ones(())
    x0_weight, xt_weight = posterior_weights(scheduler.alphas_cumprod[t], alpha_prev)
    return x0_weight * x0 + xt_weight * noisy.x_t


def _variance(scheduler: SchedulerMixin, variance_output: torch.Tensor, t: int) -> torch.Tensor:
    """σ² of the step, fixed or learned."""
    variance = scheduler._get_variance(t, predicted_variance=variance_output.float())
    if scheduler.variance_type == "learned_range":
        return variance.exp()  # from log σ²
    if scheduler.variance_type == "fixed_small_log":
        return variance**2  # from σ
    return variance


def _rescaled(gradient: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """∇·‖μ‖/‖∇‖ of each sample (B, …)."""
    # Deviation from reference: the norm of each sample's own mean, where it takes the first one's for the whole batch.
    norm, mean_norm = (tensor.flatten(1).norm(dim=1) for tensor in (gradient, mean))
    return gradient * per_sample(torch.where(norm > 0, mean_norm / norm, 0), gradient)
