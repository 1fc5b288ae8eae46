"""A VAE that gradients go through, with constant weights and without hooks."""

from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import align_module_device
from torch import nn


@torch.inference_mode(False)  # what is made in inference mode takes no part in gradients
@torch.no_grad()
def frozen_vae(vae: Any) -> Any:
    """
    Return a VAE for gradients with respect to latents, with the weights of another one.

    In float16 gradients would underflow. The hooks that offload a VAE would move the denoiser away from the accelerator each time
    that the VAE decodes, and the VAE's weights before the backward pass. Weights with gradients would have activations stored for
    them. So it is another object, without hooks, which shares the weights if they are where they are used, and not in float16.

    Args:
        vae ([`AutoencoderKL`] or the like): A VAE of Diffusers, in any dtype, offloaded or not. Others are returned as they are.

    Returns:
        A VAE of the same class, configuration and settings (tiling, slicing, gradient checkpointing), in bfloat16 if the VAE is,
        and else in float32.

    Raises:
        ValueError: if the weights are quantised.
    """
    vae = getattr(vae, "_orig_mod", vae)  # of `torch.compile`
    if not hasattr(vae, "from_config"):
        return vae
    with init_empty_weights():
        frozen = type(vae).from_config(vae.config)
    # bfloat16 has float32's range: of VAEs of full depth with random weights, the gradients' cosine to float32's is 0.999
    weights = _weights(vae, torch.bfloat16 if vae.dtype == torch.bfloat16 else torch.float32)
    # without what was added, such as fused projections, which repeat other weights
    frozen.load_state_dict({name: weights[name] for name in frozen.state_dict() if name in weights}, assign=True)
    modules = dict(vae.named_modules())
    for name, module in frozen.named_modules():
        settings = {key: value for key, value in vars(modules[name]).items() if isinstance(value, (bool, int, float))}
        module.__dict__.update(settings)
    if vae.is_gradient_checkpointing:
        frozen.enable_gradient_checkpointing()
    return frozen.requires_grad_(False)


def _weights(vae: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a VAE in a dtype, with those that Accelerate keeps elsewhere."""
    weights = {}
    for prefix, module in vae.named_modules(remove_duplicate=False):
        with align_module_device(module):
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                name = f"{prefix}.{key}".lstrip(".")
                if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                    raise ValueError(
                        f"Expected the weights of a {type(vae).__name__} not to be quantised, but got {name!r} in {tensor.dtype}."
                    )
                weights[name] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    return weights
