"""PixArt-α and PixArt-Σ: T5's tokens with their mask, and a predicted variance that training leaves out."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import nn

from .base import Columns, TextPipeline, default_of_call


class PixArtSigmaText(TextPipeline):
    """[`PixArtSigmaPipeline`]."""

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D) and `prompt_attention_mask` (b, L)."""
        # as in `__call__`, which also warns at every prompt where it cannot clean them
        clean_caption = default_of_call(pipeline, "clean_caption") and is_bs4_available() and is_ftfy_available()
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, clean_caption=clean_caption
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What the scheduler's `prediction_type` says; see [`~TextPipeline.call`]."""
        prediction = model(
            x_t,
            encoder_hidden_states=conditions["prompt_embeds"],
            encoder_attention_mask=conditions["prompt_attention_mask"],
            timestep=time,
            added_cond_kwargs={name: conditions.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]


class PixArtAlphaText(PixArtSigmaText):
    """[`PixArtAlphaPipeline`], of which the model of 1024 pixels is also told the sizes of the image; the others ignore them."""

    def size_columns(
        self, original_sizes: torch.Tensor, crop_offsets: torch.Tensor, target_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`resolution` (b, 2), height and width before resizing, and `aspect_ratio` (b, 1), that of the image as it is encoded."""
        height, width = target_sizes.float().unbind(1)
        return {"resolution": original_sizes.float(), "aspect_ratio": (height / width)[:, None]}
