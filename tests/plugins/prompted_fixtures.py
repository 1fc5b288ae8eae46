"""Fixtures that several tests of the plugins use: transformers, with prompts and without."""

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from prompted import SIZES
from torch import nn

from diffusers_dmp import DiTModel, DTRTransformer2DModel, PromptPatch, RemixDiTModel

TRANSFORMERS = {
    DiTModel: TINY_CONFIG,
    DTRTransformer2DModel: TINY_CONFIG,
    RemixDiTModel: TINY_CONFIG,
    DiTTransformer2DModel: SIZES | {"num_embeds_ada_norm": 10},
    PixArtTransformer2DModel: SIZES | {"cross_attention_dim": 48, "caption_channels": 20},
}


@pytest.fixture(params=TRANSFORMERS, ids=lambda cls: cls.__name__)
def transformer(request) -> nn.Module:
    return randomised(request.param(**TRANSFORMERS[request.param]))


@pytest.fixture
def inputs(transformer, batch) -> dict:
    """Four samples of different timesteps, by name, as all five transformers understand them."""
    if isinstance(transformer, PixArtTransformer2DModel):
        del batch["class_labels"]
        batch["encoder_hidden_states"] = torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(2))
    return batch


@pytest.fixture
def patched_dit(tiny_dit) -> DiTModel:
    """A DiT with prompts that are not zero."""
    randomised(PromptPatch.for_transformer(tiny_dit)).attach(tiny_dit)
    return tiny_dit
