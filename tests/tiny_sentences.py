"""A tiny random sentence encoder with a tokenizer of a few words, and the pipeline that generates images with it."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import filled, sd3
from transformers import BertConfig, BertModel, BertTokenizer

from diffusers_dmp import SentenceToImagePipeline

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "an",
    "photo",
    "of",
    "dress",
    "ankle",
    "boot",
    "handwritten",
    "seven",
]
TEXT_WIDTH = 16
MAX_SEQUENCE_LENGTH = 8


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def text_encoder(seed: int = 0) -> BertModel:
    sizes = {"hidden_size": TEXT_WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return filled(BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)), seed)


def transformer(seed: int = 0, **config: Any) -> Any:
    text = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH}
    pixels = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "patch_size": 4, "pos_embed_max_size": 4}
    return sd3(seed, **text | pixels | config)


def sentence_pipe(denoiser: Any = None, **components: Any) -> SentenceToImagePipeline:
    pipeline = SentenceToImagePipeline(
        transformer() if denoiser is None else denoiser,
        FlowMatchEulerDiscreteScheduler(),
        text_encoder(),
        tokenizer(),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        **components,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
