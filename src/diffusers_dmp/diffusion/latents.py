"""Latents of an `AutoencoderKL`, scaled as in every Diffusers pipeline: the diffusion model sees (z - shift)·scale.

Legend: B batch, C channels, H and W height and width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL


def vae_downsampling(vae: AutoencoderKL | None) -> int:
    """Return how many pixels a latent pixel stands for, along one axis; 1 without a VAE."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def scale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """
    Scale what a VAE has encoded to what a diffusion model learns.

    Args:
        vae ([`AutoencoderKL`]): The VAE, whose configuration has scale and shift.
        latents (`torch.Tensor` of shape (B, C, H, W)): A sample or the mean of `vae.encode(…).latent_dist`.

    Returns:
        `torch.Tensor` of shape (B, C, H, W).
    """
    return (latents - _shift(vae)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """
    Decode what a diffusion model has generated into images.

    Args:
        vae ([`AutoencoderKL`]): The VAE, whose configuration has scale and shift.
        latents (`torch.Tensor` of shape (B, C, H, W)): Scaled latents.

    Returns:
        `torch.Tensor` of shape (B, 3, H·f, W·f): images in [-1, 1], in the dtype that the VAE computes in; see [`upcast`].

    Raises:
        ValueError: if the images of a float16 VAE that cannot be cast are not finite.
    """
    latents = latents / vae.config.scaling_factor + _shift(vae)
    with upcast(vae):
        images = vae.decode(latents.to(vae.dtype)).sample
    if _needs_upcast(vae) and not _can_be_cast(vae) and not images.isfinite().all():
        raise ValueError(
            "Expected the images of a VAE to be finite, but got others: its `force_upcast` asks for float32 instead of float16, "
            "to which it cannot be cast while its layers are offloaded; `vae.to(torch.float32)` before offloading it."
        )
    return images


@contextmanager
def upcast(vae: AutoencoderKL) -> Iterator[None]:
    """
    Let a float16 VAE compute in float32 while the context lasts, if its `force_upcast` says that float16 overflows.

    As Diffusers' SDXL pipeline does. A VAE whose layers are offloaded or cast one by one stays as it is.

    Args:
        vae ([`AutoencoderKL`]): The VAE. `vae.dtype` is then the dtype of its inputs.
    """
    if not (_needs_upcast(vae) and _can_be_cast(vae)):
        yield
        return
    vae.float()  # `to` would warn at every call
    try:
        yield
    finally:
        vae.half()


def _needs_upcast(vae: AutoencoderKL) -> bool:
    return vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))


def _can_be_cast(vae: AutoencoderKL) -> bool:
    """Whether the weights are here, and not brought layer by layer by Accelerate (meta) or by hooks of Diffusers."""
    return not any(parameter.is_meta for parameter in vae.parameters()) and not any(
        hasattr(module, "_diffusers_hook") for module in vae.modules()
    )


def _shift(vae: AutoencoderKL) -> float:
    return vae.config.get("shift_factor") or 0
