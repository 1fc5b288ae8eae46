"""Latents of an `AutoencoderKL`, scaled as in every Diffusers pipeline: the diffusion model sees (z - shift)·scale.

Legend: B batch, C channels, H and W height and width.
"""

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
        `torch.Tensor` of shape (B, 3, H·f, W·f): images in [-1, 1], in the dtype of the VAE.
    """
    latents = latents / vae.config.scaling_factor + _shift(vae)
    return vae.decode(latents.to(vae.dtype)).sample


def _shift(vae: AutoencoderKL) -> float:
    return vae.config.get("shift_factor") or 0
