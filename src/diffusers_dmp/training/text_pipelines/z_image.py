"""Z-Image: lists of samples, the tokens of Qwen3, of which each prompt has its own number, and a velocity of the other sign."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import Columns, TextPipeline


class ZImageText(TextPipeline):
    """[`ZImagePipeline`]."""

    packed_size = 2  # the patch size of all its models, which is an argument of `forward`

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (L, D) and `prompt_embeds_mask` (L,), ones, of each prompt."""
        embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        ones = [torch.ones(len(sample), dtype=torch.bool, device=sample.device) for sample in embeds]
        return {"prompt_embeds": embeds, "prompt_embeds_mask": ones}

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The velocity; see [`~TextPipeline.call`]."""
        # the class takes tensors without padding, so that the CPU has to know their lengths
        embeds = conditions["prompt_embeds"]
        lengths = conditions["prompt_embeds_mask"].sum(1).tolist()
        texts = [sample[:length] for sample, length in zip(embeds, lengths)]
        velocities = model(list(x_t[:, :, None].unbind()), time, texts, return_dict=False)[0]
        return -torch.stack(list(velocities))[:, :, 0]  # of x0 - ε, as the time counts from the noise to the image
