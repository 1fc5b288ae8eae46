"""A VAE that gradients go through: in float32, without gradients of its own, and on the device of the latents."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import align_module_device
from torch import nn

# Set by Accelerate and Diffusers on modules whose weights they move or cast around each forward pass; neither has another way to
# ask for it.
_HOOKS = ("_hf_hook", "_diffusers_hook")


@contextmanager
def frozen(vae: nn.Module) -> Iterator[None]:
    """Let a VAE's weights take no part in gradients within a `with` block, so that nothing is stored for them."""
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def needs_copy(vae: Any) -> bool:
    """
    Tell whether a VAE cannot be used for gradients as it is.

    Half precision: gradients would underflow. Hooks: decoding would move whatever model was on the device before, the denoiser,
    away from it at each step, and weights that were moved away again would be missing in the backward pass.
    """
    return vae.dtype != torch.float32 or any(hasattr(module, name) for module in vae.modules() for name in _HOOKS)


@torch.no_grad()
def plain_float32_copy(vae: Any) -> Any:
    """
    Copy a VAE without its hooks, in float32 on the CPU, or on the device where its weights are.

    Args:
        vae ([`AutoencoderKL`] or the like): A VAE of Diffusers, whose weights may be offloaded or stored in another dtype.

    Returns:
        A VAE of the same class with the same configuration and settings (tiling, slicing, gradient checkpointing).
    """
    vae = getattr(vae, "_orig_mod", vae)  # of `torch.compile`
    with init_empty_weights():
        copied = type(vae).from_config(vae.config)
    for module, original in zip(copied.modules(), vae.modules()):
        settings = {name: value for name, value in vars(original).items() if isinstance(value, (bool, int, float))}
        vars(module).update(settings)
        with align_module_device(original):  # brings weights that Accelerate keeps elsewhere
            for name, parameter in original.named_parameters(recurse=False):
                weights = parameter.detach().to(torch.float32, copy=True)
                module.register_parameter(name, nn.Parameter(weights, requires_grad=False))
            for name, buffer in original.named_buffers(recurse=False):
                module.register_buffer(name, buffer.float().clone() if buffer.is_floating_point() else buffer.clone())
    return copied
