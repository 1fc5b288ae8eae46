"""Latents of a VAE, scaled as in every Diffusers pipeline, and packed as some denoisers take them.

The diffusion model sees (z - shift)·scale: of an `AutoencoderKL` one shift and one scale, of the VAEs of Wan and Qwen-Image one
for each channel.

Legend: B batch, C channels, F frames (videos only), H and W height and width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL


def vae_downsampling(vae: Any) -> int:
    """Return how many pixels a latent pixel stands for, along one axis; 1 without a VAE."""
    if vae is None:
        return 1
    config = vae.config
    if "scale_factor_spatial" in config:  # AutoencoderKLWan, of which one also cuts the image into patches
        return config.scale_factor_spatial
    if "temperal_downsample" in config:  # AutoencoderKLQwenImage
        return 2 ** len(config.temperal_downsample)
    return 2 ** (len(config.block_out_channels) - 1)


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """
    Scale what a VAE has encoded to what a diffusion model learns.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLWan`] or the like): The VAE, whose configuration has scale and shift, or mean and
            standard deviation of each channel.
        latents (`torch.Tensor` of shape (B, C, [F,] H, W)): A sample or the mean of `vae.encode(…).latent_dist`.

    Returns:
        `torch.Tensor` of the same shape.
    """
    shift, scale = latent_shift_and_scale(vae, latents)
    return (latents - shift) * scale


def unscale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """
    Scale what a diffusion model has generated to what a VAE decodes, the inverse of [`scale_latents`].

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLWan`] or the like): The VAE; see [`scale_latents`].
        latents (`torch.Tensor` of shape (B, C, [F,] H, W)): Scaled latents.

    Returns:
        `torch.Tensor` of the same shape.
    """
    shift, scale = latent_shift_and_scale(vae, latents)
    return latents / scale + shift


def latent_shift_and_scale(vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
    """
    Return the shift and the scale of a VAE's latents: numbers, or tensors of one value for each channel.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLWan`] or the like): The VAE; see [`scale_latents`].
        latents (`torch.Tensor` of shape (B, C, [F,] H, W)): Latents that they are to be applied to. Their standard deviations are
            scaled by the scale alone.
    """
    config = vae.config
    shift: Any = config.get("shift_factor") or 0
    scale: Any = config.get("scaling_factor", 1)
    # AutoencoderKLWan and AutoencoderKLQwenImage have these instead; an AutoencoderKL of SDXL may have them as well
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (_per_channel(config[name], latents) for name in ("latents_mean", "latents_std"))
        shift, scale = mean, scale / std
    return shift, scale


def _per_channel(values: list[float], latents: torch.Tensor) -> torch.Tensor:
    """One value for each channel, in the shape that is broadcast to latents (B, C, …)."""
    # filled one by one, as a copy of the list would wait until an accelerator has done all that it was asked for before
    filled = [torch.full((), value, device=latents.device, dtype=latents.dtype) for value in values]
    return torch.stack(filled).view(1, -1, *[1] * (latents.ndim - 2))


def latent_distribution(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Encode images into latents, of which a VAE gives a normal distribution.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLWan`] or the like): The VAE.
        images (`torch.Tensor` of shape (B, 3, [F,] H·f, W·f)): Images or videos in [-1, 1].

    Returns:
        Mean and standard deviation (B, C, [F,] H, W), not yet scaled, in the dtype that the VAE computes in; see [`upcast`].
    """
    with upcast(vae):
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
    return posterior.mean, posterior.std


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """
    Decode what a diffusion model has generated into images.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLWan`] or the like): The VAE; see [`scale_latents`].
        latents (`torch.Tensor` of shape (B, C, [F,] H, W)): Scaled latents.

    Returns:
        `torch.Tensor` of shape (B, 3, [F,] H·f, W·f): images in [-1, 1], in the dtype that the VAE computes in; see [`upcast`].

    Raises:
        ValueError: if the images of a float16 VAE that cannot be cast are not finite.
    """
    latents = unscale_latents(vae, latents)
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


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """
    Make a sequence of patches of 2 x 2 latent pixels, as the denoisers of Flux and Qwen-Image take them.

    Args:
        latents (`torch.Tensor` of shape (B, C, H, W)): The latents, of even height and width.

    Returns:
        `torch.Tensor` of shape (B, H/2·W/2, 4·C), row by row; in each patch the channel counts slowest.

    Raises:
        ValueError: if height or width is odd.
    """
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"Expected `latents` to be of even height and width, but got {height} x {width}.")
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Make latents of a sequence of patches, the inverse of [`pack_latents`].

    Args:
        packed (`torch.Tensor` of shape (B, H/2·W/2, 4·C)): The patches.
        height (`int`): H, in latent pixels.
        width (`int`): W, in latent pixels.

    Returns:
        `torch.Tensor` of shape (B, C, H, W).
    """
    patches = packed.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(patches, 2)
