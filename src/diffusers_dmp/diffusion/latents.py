"""Latents of an `AutoencoderKL`, as every pipeline scales them.

Legend: B batch, C channels, H and W height and width.
"""

import torch
from diffusers import AutoencoderKL


def vae_downsampling(vae: AutoencoderKL | None) -> int:
    """Pixels per latent pixel and axis; 1 without a VAE."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What a diffusion model made (B, C, H, W) → images in [-1, 1], in the VAE's dtype."""
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    return vae.decode(latents.to(vae.dtype)).sample


def scale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """What the VAE encoded (B, C, H, W) → what a diffusion model learns."""
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
