"""What the variance channels of a model mean: the share f of log β_t in log σ² = f·log β_t + (1 - f)·log β̃_t.
Learned variance: https://arxiv.org/abs/2102.09672 (iDDPM, equation 15)
"""

import torch

# by name, from a model's variance channels v to f
VARIANCE_TYPES = {
    "learned_range": lambda v: (v + 1) / 2,  # iDDPM, ADM and DiT: v unbounded, [-1, 1] spans the range
    "learned_range_sigmoid": lambda v: 1 - v,  # Patch Diffusion: v in [0, 1], in the opposite sense
}


def as_learned_range(variance: torch.Tensor, variance_type: str) -> torch.Tensor:
    """
    Variance channels as Diffusers' schedulers with `variance_type="learned_range"` read them.

    Args:
        variance (`torch.Tensor` of any shape): A model's variance channels.
        variance_type (`str`): One of `VARIANCE_TYPES`.
    """
    if variance_type == "learned_range":
        return variance
    # f = (v + 1)/2  ⇔  v = 2·f - 1
    return 2 * VARIANCE_TYPES[variance_type](variance) - 1
