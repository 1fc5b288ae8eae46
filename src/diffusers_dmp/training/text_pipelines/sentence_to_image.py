"""This package's [`SentenceToImagePipeline`]: one sentence encoder, and pixels where there is no VAE."""

from typing import Any

import torch

from .base import Columns
from .sd3 import StableDiffusion3Text


class SentenceToImageText(StableDiffusion3Text):
    """[`SentenceToImagePipeline`], whose transformer is called as that of Stable Diffusion 3."""

    text_components = ("tokenizer", "text_encoder")
    needs_vae = False

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D) and `pooled_prompt_embeds` (b, D)."""
        prompt_embeds, pooled_prompt_embeds = pipeline.encode_prompt(prompts)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def encode_images(self, pipeline: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Without a VAE the mean is the image itself, in grey where it has one channel, and there is no deviation."""
        if pipeline.vae is not None:
            return super().encode_images(pipeline, images)
        images = images.float()
        if pipeline.config.image_channels == 1:
            images = images.mean(dim=1, keepdim=True)
        return images, torch.zeros_like(images)
