"""FLUX.1: CLIP's pooled embedding, T5's tokens, packed latents, and the guidance scale where it is distilled into the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...diffusion.latents import pack_latents, unpack_latents
from .base import Columns, TextPipeline


@dataclass(frozen=True)
class FluxText(TextPipeline):
    """
    [`FluxPipeline`].

    Args:
        guidance_scale (`float`): What a model that is distilled for guidance (FLUX.1-dev) is told in training, as
            `guidance_scale` of Diffusers' training scripts: 1 by default, for the training images are no guided ones. Inference
            chooses its own. `register_conditions(FluxPipeline, FluxText(guidance_scale=3.5))` changes it.
    """

    guidance_scale: float = 1.0

    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    packed_size = 2

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """`prompt_embeds` (b, L, D) and `pooled_prompt_embeds` (b, P)."""
        embeds, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None)
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
        batch_size, _, height, width = x_t.shape
        text = conditions["prompt_embeds"]
        guidance = None
        if config.get("guidance_embeds"):
            guidance = torch.full((batch_size,), self.guidance_scale, device=x_t.device)
        velocity = model(
            hidden_states=pack_latents(x_t),
            timestep=time,
            guidance=guidance,
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            img_ids=image_positions(height // 2, width // 2, x_t.device),
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)


def image_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Return the positions (height·width, 3) of patches, row by row: 0, the row and the column."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
