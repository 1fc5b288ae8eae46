"""Stable Diffusion 1.x, 2.x and XL: CLIP encoders and U-Nets, which are told the time before the text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import Columns, TextPipeline


class StableDiffusionText(TextPipeline):
    """[`StableDiffusionPipeline`]: Stable Diffusion 1.x and 2.x."""

    component = "unet"
    components = ("unet",)

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D)."""
        embeds, _ = pipeline.encode_prompt(
            prompts, device=None, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds}

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the scheduler's `prediction_type` says; see [`~TextPipeline.call`]."""
        return model(x_t, time, encoder_hidden_states=conditions["prompt_embeds"], return_dict=False)[0]


class StableDiffusionXLText(StableDiffusionText):
    """[`StableDiffusionXLPipeline`], of which the U-Net is also told the sizes of the image."""

    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """
        `prompt_embeds` (b, L, D) and `pooled_prompt_embeds` (b, P).

        Of an empty prompt they are zeros if the pipeline's `force_zeros_for_empty_prompt` says so: with guidance, this is its
        unconditional prediction, which training with dropped captions has to be for.
        """
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            is_given = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device)
            embeds, pooled = embeds * is_given[:, None, None], pooled * is_given[:, None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def size_columns(
        self, original_sizes: torch.Tensor, crop_offsets: torch.Tensor, target_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`time_ids` (b, 6): original size, crop and size, each height before width."""
        return {"time_ids": torch.cat([original_sizes, crop_offsets, target_sizes], dim=1).float()}

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the scheduler's `prediction_type` says; see [`~TextPipeline.call`]."""
        return model(
            x_t,
            time,
            encoder_hidden_states=conditions["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": conditions["pooled_prompt_embeds"],
                "time_ids": conditions["time_ids"],
            },
            return_dict=False,
        )[0]
