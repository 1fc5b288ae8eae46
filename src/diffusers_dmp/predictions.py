"""What a denoiser predicts, from one kind to another.

With x_t = α·x0 + σ·ε, α² + σ² = 1: 'epsilon' is ε, 'sample' is x0, 'v_prediction' is v = α·ε - σ·x0
(https://arxiv.org/abs/2202.00512).
"""

import torch

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


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
    """A prediction of one kind as one of another; see [`to_x0`] for the arguments."""
    if prediction_type == target_type:
        return prediction
    x0 = to_x0(prediction, x_t, alpha, sigma, prediction_type)
    if target_type == "sample":
        return x0
    epsilon = (x_t - alpha * x0) / sigma
    return epsilon if target_type == "epsilon" else alpha * epsilon - sigma * x0
