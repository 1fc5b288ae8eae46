"""Learned variance: what the variance channels of a model mean (iDDPM, https://arxiv.org/abs/2102.09672, equation 15).

The variance σ² of a step lies between β̃_t and β_t: log σ² = f·log β_t + (1 - f)·log β̃_t. A model predicts the fraction f.
"""

import torch

# the fraction f, from a model's variance channels v
VARIANCE_TYPES = {
    "learned_range": lambda v: (v + 1) / 2,  # iDDPM, ADM and DiT: v unbounded, [-1, 1] spans the range
    "learned_range_sigmoid": lambda v: 1 - v,  # Patch Diffusion: v in [0, 1], in the opposite direction
}


def as_learned_range(variance: torch.Tensor, variance_type: str) -> torch.Tensor:
    """
    Convert variance channels to what Diffusers' schedulers with `variance_type="learned_range"` expect.

    Args:
        variance (`torch.Tensor` of any shape): The variance channels of a model.
        variance_type (`str`): What they mean, one of `VARIANCE_TYPES`.

    Returns:
        `torch.Tensor` of the same shape.
    """
    if variance_type == "learned_range":
        return variance
    # f = (v + 1)/2  ⇔  v = 2·f - 1
    return 2 * VARIANCE_TYPES[variance_type](variance) - 1
