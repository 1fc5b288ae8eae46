"""What a denoiser predicts, and how one kind of prediction is converted into another.

With x_t = α·x0 + σ·ε and α² + σ² = 1, `prediction_type` "epsilon" is the noise ε, "sample" is the clean image x0, and
"v_prediction" is the velocity v = α·ε - σ·x0 (https://arxiv.org/abs/2202.00512).

Legend: B batch, C channels, H and W height and width, S denoising steps.
"""

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import alpha_sigma, is_flow_matching, scheduler_setting

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def expected_prediction_type(scheduler: SchedulerMixin) -> str:
    """Return the `prediction_type` that a scheduler expects; "flow_prediction" if its class has no such setting."""
    return scheduler_setting(scheduler, "prediction_type") or "flow_prediction"


def prediction_type_of(denoiser: ModelMixin, scheduler: SchedulerMixin) -> str:
    """
    Return what a denoiser predicts: its own `prediction_type`, or what the scheduler's configuration says if it has none.

    A flow-matching scheduler that was made from the configuration of another scheduler still has the `prediction_type` of
    that one, which says what the denoiser was trained for.
    """
    return denoiser.config.get("prediction_type") or scheduler.config.get("prediction_type") or "flow_prediction"


def velocity(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    Compute the velocity v = α·ε - σ·x0 (https://arxiv.org/abs/2202.00512).

    Args:
        x0 (`torch.Tensor` of shape (B, C, H, W)): The clean samples.
        noise (`torch.Tensor` of shape (B, C, H, W)): ε.
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
        prediction (`torch.Tensor` of shape (B, C, H, W)): A prediction of the kind `prediction_type`.
        x_t (`torch.Tensor` of shape (B, C, H, W)): The noisy samples that it was made for.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ of `x_t`.
        prediction_type (`str`): One of `PREDICTION_TYPES`.

    Returns:
        `torch.Tensor` of shape (B, C, H, W).
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
    Convert a prediction of one kind into the same prediction of another kind.

    Args:
        prediction (`torch.Tensor` of shape (B, C, H, W)): A prediction of the kind `prediction_type`.
        x_t (`torch.Tensor` of shape (B, C, H, W)): The noisy samples that it was made for.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ of `x_t`.
        prediction_type, target_type (`str`): The kind that it is and the kind that it becomes, of `PREDICTION_TYPES`.

    Returns:
        `torch.Tensor` of shape (B, C, H, W).

    Raises:
        ValueError: if the kinds differ and one of them is not in `PREDICTION_TYPES`.
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
    Check that a scheduler's noise levels are those of its `alphas_cumprod`.

    Raises:
        ValueError: if the scheduler has no `alphas_cumprod`, or is a flow-matching one.
    """
    if is_flow_matching(scheduler) or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"Expected a scheduler with `alphas_cumprod`, but got a {type(scheduler).__name__} with other noise levels."
        )


def noise_levels(scheduler: SchedulerMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute α and σ of the x_t at the beginning of each of a scheduler's steps, scaled to α² + σ² = 1.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler with `alphas_cumprod`, whose timesteps are set.

    Returns:
        Two `torch.Tensor` of shape (S,), one number for each of `scheduler.timesteps`, in float32 on the CPU.

    Raises:
        ValueError: see [`check_noise_levels`].
    """
    check_noise_levels(scheduler)
    timesteps = scheduler.timesteps.cpu().double()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        # here `sigmas` is σ/α; the timesteps may be rounded to integers, so that they are less exact
        angles = sigmas[: len(timesteps)].cpu().double().atan()
    else:
        # interpolate between training timesteps by the angle, from 0 (image) to π/2 (noise), which is finite at ᾱ = 0
        alphas, sigmas = alpha_sigma(scheduler.alphas_cumprod.cpu().double())
        table = torch.atan2(sigmas, alphas)
        low = timesteps.floor().long().clamp(max=len(table) - 1)
        angles = torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], timesteps - low)
    return angles.cos().float(), angles.sin().float()


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
