"""Qwen-Image: the tokens of Qwen2.5-VL, of which each prompt has its own number, and packed latents of a video VAE."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...diffusion.latents import pack_latents, unpack_latents
from .base import Columns, TextPipeline, default_of_call


class QwenImageText(TextPipeline):
    """[`QwenImagePipeline`]."""

    packed_size = 2

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (L, D) and `prompt_embeds_mask` (L,), ones, of each prompt."""
        max_length = default_of_call(pipeline, "max_sequence_length")
        embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=max_length)
        if mask is None:  # all prompts are of one length
            mask = embeds.new_ones(embeds.shape[:2])
        each = [sample[own_mask.bool()] for sample, own_mask in zip(embeds, mask)]
        ones = [torch.ones(len(sample), dtype=torch.bool, device=sample.device) for sample in each]
        return {"prompt_embeds": each, "prompt_embeds_mask": ones}

    def encode_images(self, pipeline: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (b, C, h, w); see [`~TextPipeline.encode_images`]."""
        mean, std = super().encode_images(pipeline, images[:, :, None])  # a video of one frame
        return mean[:, :, 0], std[:, :, 0]

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The velocity; see [`~TextPipeline.call`]."""
        batch_size, _, height, width = x_t.shape
        velocity = model(
            hidden_states=pack_latents(x_t),
            timestep=time,
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
            encoder_hidden_states=conditions["prompt_embeds"],
            img_shapes=[[(1, height // 2, width // 2)]] * batch_size,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)
