"""How the latents of a pipeline become the images that guide it.

Legend: B batch, C channels, N packed patches, F frames (videos only), f chosen frames, H and W height and width in pixels, h and w
those of the latents.
"""

import copy
from typing import Any

import torch

from ..diffusion.latents import decode_latents


class LatentDecoder:
    """
    Decode latents (B, C, h, w) of a VAE, as most pipelines have them.

    Args:
        vae ([`AutoencoderKL`] or the like): The VAE.
    """

    def __init__(self, vae: Any):
        self.vae = vae

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decode latents as the scheduler sees them.

        Args:
            latents (`torch.Tensor` of shape (B, …)): Scaled latents.

        Returns:
            `torch.Tensor` of shape (B, 3, H, W), or (B, f, 3, H, W) for videos: images in [-1, 1].
        """
        return decode_latents(self.vae, latents)

    def in_float32(self) -> "LatentDecoder":
        """The same decoder with a VAE in float32, a copy if it is not: gradients would underflow in half precision."""
        if self.vae.dtype == torch.float32:
            return self
        decoder = copy.copy(self)
        decoder.vae = copy.deepcopy(self.vae).float()
        return decoder
