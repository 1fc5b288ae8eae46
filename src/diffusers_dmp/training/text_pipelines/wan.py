"""Wan 2.1 and 2.2, text to video: UMT5's tokens and latents with frames; an image is a video of one frame."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import Columns, TextPipeline, default_of_call


class WanText(TextPipeline):
    """
    [`WanPipeline`].

    Wan 2.2 has two denoisers, `transformer` for much noise and `transformer_2`; either is called in the same way. Its model of
    5B is told one time for each token, which is the same number for all of them where no image is given.
    """

    components = ("transformer", "transformer_2")

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D), with zeros after each prompt's tokens, which the denoiser sees."""
        max_length = default_of_call(pipeline, "max_sequence_length")
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=max_length)
        return {"prompt_embeds": embeds}

    def encode_images(self, pipeline: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and standard deviation (b, C, f, h, w), f = 1 for images; see [`~TextPipeline.encode_images`].

        Raises:
            ValueError: also if the number of frames is not one of 1, 5, 9 and so on: the VAE would leave out the last ones.
        """
        videos = images if images.ndim == 5 else images[:, :, None]
        frames, compressed = videos.shape[2], pipeline.vae.config.scale_factor_temporal
        if (frames - 1) % compressed:
            raise ValueError(
                f"Expected videos of one frame and a multiple of {compressed}, which the VAE makes one frame of, but got {frames} "
                "frames."
            )
        return super().encode_images(pipeline, videos)

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The velocity; see [`~TextPipeline.call`]."""
        return model(
            hidden_states=x_t, timestep=time, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False
        )[0]
