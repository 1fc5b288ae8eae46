"""Clean samples x0 of a batch: images or their latents, some of them mirrored.

Legend: b batch, C channels and S size of x0 (those of the latents, if there is a VAE).
"""

import torch
from diffusers import AutoencoderKL

from ...diffusion.latents import latent_distribution, scale_latents


@torch.no_grad()
def clean_samples(
    batch: dict[str, torch.Tensor],
    flips: torch.Tensor,
    latent_noise: torch.Tensor | None = None,
    vae: AutoencoderKL | None = None,
) -> torch.Tensor:
    """
    The clean samples that a model learns.

    Args:
        batch (`dict[str, torch.Tensor]`): With `images` (b, C, H, W) in [-1, 1], or with `mean` and `std` of latents, both
            (b, 2, C, S, S): of the image, and of its mirror image. Latents of a training with text, (b, 1 or 2, C, …), are
            scaled already.
        flips (`torch.BoolTensor` of shape (b,)): The samples to mirror.
        latent_noise (`torch.Tensor` of shape (b, C, S, S), *optional*): Standard normal, to sample the VAE's posterior.
        vae ([`AutoencoderKL`], *optional*): To train on its latents; `latent_noise` is needed then. None if the latents in the
            batch are scaled.

    Returns:
        `torch.Tensor` of shape (b, C, S, S): x0, scaled as the VAE's configuration says if it is a latent.
    """
    if "mean" in batch:
        index = torch.arange(len(flips), device=flips.device)
        mean, std = (batch[name][index, flips.long()].float() for name in ("mean", "std"))
    else:
        images = torch.where(flips[:, None, None, None], batch["images"].flip(-1), batch["images"])
        if vae is None:
            return images
        mean, std = latent_distribution(vae, images)
    assert latent_noise is not None  # sampled for every batch of latents
    latents = mean + std * latent_noise.to(std.dtype)
    return (latents if vae is None else scale_latents(vae, latents)).float()
