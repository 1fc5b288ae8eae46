"""Floating-point operations of a denoiser, a pipeline or any other call."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class _FlopCounter(TorchDispatchMode):
    """
    Count the floating-point operations of everything that is dispatched.

    PyTorch's `FlopCounterMode` does not see what `torch.autograd.grad` computes, which guidance calls.
    """

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
    """
    Count the operations of a denoiser's forward pass.

    Args:
        denoiser: The model.
        inputs, kwargs: What it is called with.

    Returns:
        10⁹ floating-point operations; an addition and a multiplication are two.
    """
    return gigaflops_of(lambda: denoiser(*inputs, **kwargs))


def gigaflops_of(call: Callable[[], Any]) -> float:
    """
    Count the operations of any call, for example of a whole pipeline or of a backward pass.

    Args:
        call (`Callable`): Called once, without arguments.

    Returns:
        10⁹ floating-point operations; an addition and a multiplication are two.
    """
    # attention as matrix products, because the registry does not know the fused kernel of CPUs
    with _FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total / 1e9
