"""What a denoiser predicts, and how one kind of prediction is converted into another.

With x_t = α·x0 + σ·ε, `prediction_type` "epsilon" is the noise ε, "sample" is the clean image x0, "v_prediction" is, where
α² + σ² = 1, the velocity v = α·ε - σ·x0 (https://arxiv.org/abs/2202.00512), and "flow_prediction" the velocity ε - x0 of flow
matching, where α + σ = 1 (https://arxiv.org/abs/2210.02747).

Legend: B batch, S denoising steps; the other dimensions of a sample are its own.
"""

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import angles_at, is_flow_matching, scheduler_setting
from .timesteps import SINGLE_PRECISION, counts_from_noise

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")  # of diffusion
FLOW_PREDICTION = "flow_prediction"  # of flow matching


def expected_prediction_type(scheduler: SchedulerMixin) -> str:
    """Return the `prediction_type` that a scheduler expects; "flow_prediction" if its class has no such setting."""
    return scheduler_setting(scheduler, "prediction_type") or FLOW_PREDICTION


def prediction_type_of(denoiser: ModelMixin, scheduler: SchedulerMixin) -> str:
    """
    Return what a denoiser predicts: its own `prediction_type`, or what the scheduler's configuration says if it has none.

    A flow-matching scheduler that was made from the configuration of another scheduler still has the `prediction_type` of
    that one, which says what the denoiser was trained for.
    """
    return denoiser.config.get("prediction_type") or scheduler.config.get("prediction_type") or FLOW_PREDICTION


def velocity(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    Compute the velocity v = α·ε - σ·x0 (https://arxiv.org/abs/2202.00512).

    Args:
        x0 (`torch.Tensor` of shape (B, …)): The clean samples.
        noise (`torch.Tensor` of shape (B, …)): ε.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ.
    """
    return alpha * noise - sigma * x0


def flow_velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Compute the velocity of flow matching, ε - x0 (https://arxiv.org/abs/2210.02747), which "flow_prediction" means.

    Args:
        x0 (`torch.Tensor` of shape (B, …)): The clean samples.
        noise (`torch.Tensor` of shape (B, …)): ε.
    """
    return noise - x0


def to_x0(
    prediction: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """
    Compute the clean samples x̂0 that a prediction implies.

    Args:
        prediction (`torch.Tensor` of shape (B, …)): A prediction of the kind `prediction_type`.
        x_t (`torch.Tensor` of shape (B, …)): The noisy samples that it was made for.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ of `x_t`.
        prediction_type (`str`): One of `PREDICTION_TYPES`, or `FLOW_PREDICTION`.

    Returns:
        `torch.Tensor` of shape (B, …).
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction
    if prediction_type == FLOW_PREDICTION:
        # x_t = α·x0 + σ·(x0 + v)
        return (x_t - sigma * prediction) / (alpha + sigma)
    return prediction


def convert_prediction(
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    prediction_type: str,
    target_type: str,
) -> torch.Tensor:
    """
    Convert a prediction of one kind into the same prediction of another kind.

    Args:
        prediction (`torch.Tensor` of shape (B, …)): A prediction of the kind `prediction_type`.
        x_t (`torch.Tensor` of shape (B, …)): The noisy samples that it was made for.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ of `x_t`.
        prediction_type, target_type (`str`): The kind that it is and the kind that it becomes, of `PREDICTION_TYPES` and
            `FLOW_PREDICTION`.

    Returns:
        `torch.Tensor` of shape (B, …).

    Raises:
        ValueError: if the kinds differ and one of them is unknown.
    """
    if prediction_type == target_type:
        return prediction
    known = (*PREDICTION_TYPES, FLOW_PREDICTION)
    for kind in (prediction_type, target_type):
        if kind not in known:
            raise ValueError(f"Expected a prediction type of {', '.join(known)}, but got {kind!r}.")
    x0 = to_x0(prediction, x_t, alpha, sigma, prediction_type)
    if target_type == "sample":
        return x0
    epsilon = prediction if prediction_type == "epsilon" else (x_t - alpha * x0) / sigma
    if target_type == FLOW_PREDICTION:
        return flow_velocity(x0, epsilon)
    return epsilon if target_type == "epsilon" else velocity(x0, epsilon, alpha, sigma)


def check_noise_levels(scheduler: SchedulerMixin) -> None:
    """
    Check that a scheduler's noise levels are known: those of its `alphas_cumprod`, or of flow matching.

    Raises:
        ValueError: if it has neither.
    """
    if not is_flow_matching(scheduler) and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"Expected a scheduler with `alphas_cumprod` or a flow-matching one, but got a {type(scheduler).__name__} with other "
            "noise levels."
        )


def noise_levels(scheduler: SchedulerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute α and σ of the x_t at the beginning of each of a scheduler's steps.

    They are scaled to α² + σ² = 1, and for a flow-matching scheduler to α + σ = 1.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler with `alphas_cumprod` or a flow-matching one, whose timesteps are set.

    Returns:
        Two `torch.Tensor` of shape (S,), one number for each of `scheduler.timesteps`, in float64 on the CPU.

    Raises:
        ValueError: see [`check_noise_levels`]; and if a flow-matching scheduler's σ is not in [0, 1].
    """
    check_noise_levels(scheduler)
    timesteps = scheduler.timesteps.cpu().double()
    if is_flow_matching(scheduler):
        return _flow_levels(scheduler, len(timesteps))
    sigmas = getattr(scheduler, "sigmas", None)
    # DPMSolverSDEScheduler lists where its steps begin and end, and evaluates in the middle between them as well
    has_midpoints = hasattr(scheduler, "mid_point_sigma")
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1) and not has_midpoints:
        # here `sigmas` is σ/α; the timesteps may be rounded to integers, so that they are less exact
        angles = sigmas[: len(timesteps)].cpu().double().atan()
    else:
        angles = angles_at(scheduler.alphas_cumprod, timesteps)
    return angles.cos(), angles.sin()


def _flow_levels(scheduler: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ of flow matching."""
    sigmas = scheduler.sigmas[:count].cpu().double()
    if sigmas.min() < 0 or sigmas.max() > 1 + SINGLE_PRECISION:
        raise ValueError(
            f"Expected the σ of a flow-matching scheduler to be in [0, 1], but got some up to {sigmas.max():.4g} from a "
            f"{type(scheduler).__name__}; its noise levels are those of another process."
        )
    if counts_from_noise(scheduler):
        sigmas = 1 - sigmas
    return 1 - sigmas, sigmas


def posterior_weights(
    alphas_cumprod: torch.Tensor, alphas_cumprod_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute c0 and ct of the mean c0·x0 + ct·x_t of q(x_s | x_t, x0), s < t (DDPM, equation 7,
    https://arxiv.org/abs/2006.11239).

    Args:
        alphas_cumprod (`torch.Tensor` of any shape): ᾱ_t.
        alphas_cumprod_prev (`torch.Tensor` of the same shape): ᾱ_s.

    Returns:
        c0 and ct, of the same shape.
    """
    alphas = alphas_cumprod / alphas_cumprod_prev  # α_t = 1 - β_t
    return (
        (1 - alphas) * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
        (1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod),
    )
