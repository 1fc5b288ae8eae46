"""Stable Diffusion 3 and 3.5: two CLIP encoders and, if the pipeline has it, T5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import Columns, TextPipeline


class StableDiffusion3Text(TextPipeline):
    """[`StableDiffusion3Pipeline`]. Without `text_encoder_3`, its own `encode_prompt` puts zeros in the place of T5's tokens."""

    text_components: tuple[str, ...] = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D) and `pooled_prompt_embeds` (b, P)."""
        # its `encode_prompt` reads the width of those zeros from the transformer
        if getattr(pipeline, "text_encoder_3", None) is None and getattr(pipeline, "transformer", None) is None:
            raise ValueError(
                "Expected a StableDiffusion3Pipeline with `text_encoder_3`, or else with its `transformer`, but got neither; load the "
                "whole pipeline in Python, and call `encode_prompts(args, pipeline)`."
            )
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

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
            hidden_states=x_t,
            timestep=time,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
