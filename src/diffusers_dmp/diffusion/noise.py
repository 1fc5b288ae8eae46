"""Noise levels: how much image and how much noise there is in x_t.

With x_t = α·x0 + σ·ε: α² + σ² = 1 for DDPM (https://arxiv.org/abs/2006.11239), α + σ = 1 for flow matching
(https://arxiv.org/abs/2210.02747).

Legend: B batch, S denoising steps.
"""

from typing import Any

import torch


def signal_to_noise_ratio(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """SNR = ᾱ/(1 - ᾱ) = α²/σ² of each ᾱ, in the shape and dtype of `alphas_cumprod`."""
    return alphas_cumprod / (1 - alphas_cumprod)


def noisy_sample(x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """
    x_t = α·x0 + σ·ε.

    Args:
        x0 (`torch.Tensor` of shape (B, …)): The clean samples.
        noise (`torch.Tensor` of shape (B, …)): ε.
        alpha, sigma (`torch.Tensor`, broadcastable to them): α and σ.
    """
    return alpha * x0 + sigma * noise


def is_flow_matching(scheduler: Any) -> bool:
    """Whether a scheduler's x_t is (1-σ)·x0 + σ·ε with t = σ·T, whatever ᾱ it may have besides."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))
