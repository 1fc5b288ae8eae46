"""What a denoiser costs."""

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def gigaflops(denoiser: ModelMixin, *inputs: torch.Tensor, **kwargs: torch.Tensor) -> float:
    """10⁹ floating-point operations of a forward pass, an addition and a multiplication being two."""
    # attention as matrix products: the counter knows no CPU's fused kernel
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoiser(*inputs, **kwargs)
    return counter.get_total_flops() / 1e9
