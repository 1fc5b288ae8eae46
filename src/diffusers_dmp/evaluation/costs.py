"""Floating-point operations of a denoiser, a pipeline or any other call."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..training.utilisation import count_flops


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
    Count the operations of any call, for example of a whole pipeline or of a backward pass; see [`count_flops`].

    Args:
        call (`Callable`): Called once, without arguments.

    Returns:
        10⁹ floating-point operations; an addition and a multiplication are two.
    """
    return count_flops(call) / 1e9
