"""What a denoiser predicts, from one kind to another.

With x_t = α·x0 + σ·ε, α² + σ² = 1: 'epsilon' is ε, 'sample' is x0, 'v_prediction' is v = α·ε - σ·x0
(https://arxiv.org/abs/2202.00512).
"""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import is_flow_matching

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def expected_prediction_type(scheduler: SchedulerMixin) -> str:
    """What a scheduler is to be handed: 'flow_prediction' for the flow-matching ones, which do not say."""
    return scheduler.config.get("prediction_type", "flow_prediction")


def velocity(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    v = α·ε - σ·x0 (https://arxiv.org/abs/2202.00512).

    Args:
        x0, noise (`torch.Tensor` of shape (B, C, H, W)): The clean samples and ε.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ.
    """
    return alpha * noise - sigma * x0


def to_x0(
    prediction: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """
    x̂0 (B, C, H, W).

    Args:
        prediction (`torch.Tensor` of shape (B, C, H, W)): Of the kind `prediction_type`.
        x_t (`torch.Tensor` of shape (B, C, H, W)): What it was made from.
        alpha, sigma (`torch.Tensor`, broadcastable to it): α and σ.
        prediction_type (`str`): One of `PREDICTION_TYPES`.
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction
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
    A prediction of one kind as one of another; see [`to_x0`] for the arguments.

    Raises:
        ValueError: if a kind is not one of `PREDICTION_TYPES`.
    """
    if prediction_type == target_type:
        return prediction
    for kind in (prediction_type, target_type):
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"Expected a prediction type of {', '.join(PREDICTION_TYPES)}, but got {kind!r}.")
    x0 = to_x0(prediction, x_t, alpha, sigma, prediction_type)
    if target_type == "sample":
        return x0
    epsilon = (x_t - alpha * x0) / sigma
    return epsilon if target_type == "epsilon" else velocity(x0, epsilon, alpha, sigma)


def check_noise_levels(scheduler: SchedulerMixin) -> None:
    """
    Raises:
        ValueError: if the scheduler has no ᾱ, or its x_t is another: a flow-matching one.
    """
    if is_flow_matching(scheduler) or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"Expected a scheduler with `alphas_cumprod`, but got a {type(scheduler).__name__} with other noise levels."
        )


def noise_levels(scheduler: SchedulerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """
    α and σ of the x_t that a scheduler's steps begin with, of unit variance for data of unit variance.

    Args:
        scheduler ([`SchedulerMixin`]): With `alphas_cumprod`, and its timesteps set.

    Returns:
        Two `torch.Tensor` of shape (S,), one number for each of `scheduler.timesteps`, in float32 on the CPU.

    Raises:
        ValueError: see [`check_noise_levels`].
    """
    check_noise_levels(scheduler)
    timesteps = scheduler.timesteps.cpu().double()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        # σ/α itself, of which the timesteps may only be the nearest integers
        angles = sigmas[: len(timesteps)].cpu().double().atan()
    else:
        # Between two timesteps of the training schedule, on the arc from image (0) to noise (π/2): it is finite at ᾱ = 0.
        table = scheduler.alphas_cumprod.cpu().double().sqrt().acos()
        low = timesteps.floor().long().clamp(max=len(table) - 1)
        angles = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], timesteps - low)
    return angles.cos().float(), angles.sin().float()


def posterior_weights(
    alphas_cumprod: torch.Tensor, alphas_cumprod_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    c0 and ct of the mean c0·x0 + ct·x_t of q(x_s | x_t, x0) for ᾱ_t and ᾱ_s, s < t (https://arxiv.org/abs/2006.11239,
    equation 7).
    """
    alphas = alphas_cumprod / alphas_cumprod_prev  # α_t = 1 - β_t
    return (
        (1 - alphas) * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
        (1 - alphas_cumprod_prev) * alphas.sqrt() / (1 - alphas_cumprod),
    )
