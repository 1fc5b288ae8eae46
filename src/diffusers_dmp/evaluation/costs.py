"""What a denoiser costs."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _FlopCounter(TorchDispatchMode):
    """As torch's `FlopCounterMode`, which cannot look into `torch.autograd.grad`, as guidance calls it."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        return output


@torch.no_grad()
def gigaflops(denoiser: ModelMixin, *inputs: torch.Tensor, **kwargs: torch.Tensor) -> float:
    """10⁹ floating-point operations of a forward pass, an addition and a multiplication being two."""
    return gigaflops_of(lambda: denoiser(*inputs, **kwargs))


def gigaflops_of(call: Callable[[], Any]) -> float:
    """The same of whatever is called, a whole pipeline or a backward pass say."""
    # attention as matrix products: the registry knows no CPU's fused kernel
    with _FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total / 1e9
