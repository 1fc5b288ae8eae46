"""Tiny random text encoders of the real classes, with tokenizers, for the pipelines of `tiny_pipelines`.

`with_text(name, pipe)` makes a pipeline that encodes its prompts itself; it can be saved and loaded as any other.
"""

import functools
from typing import Any

from tiny_pipelines import filled
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

# Each is one token, so that the words of Qwen-Image's template are the 34 tokens that its pipeline cuts off.
TEMPLATE_WORDS = [
    "system",
    "Describe",
    "Ġthe",
    "Ġimage",
    "Ġby",
    "Ġdetailing",
    "Ġcolor",
    "Ġshape",
    "Ġsize",
    "Ġtexture",
    "Ġquantity",
    "Ġtext",
    "Ġspatial",
    "Ġrelationships",
    "Ġof",
    "Ġobjects",
    "Ġand",
    "Ġbackground",
    "user",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Characters as tokens; 77 at most."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, [], model_max_length=77)


@functools.cache
def t5_tokenizer() -> T5TokenizerFast:
    """Characters as tokens, for T5 and UMT5."""
    characters = [(chr(code), -3.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *characters]
    return T5TokenizerFast(vocab, extra_ids=0, model_max_length=512)


@functools.cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, without the words of the template, for Qwen2.5-VL and Qwen3."""
    merges = {(word[:end], word[end]): None for word in TEMPLATE_WORDS for end in range(1, len(word))}
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab, list(merges), extra_special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def clip(kind: type = CLIPTextModel, hidden_size: int = 32, projection_dim: int = 32, seed: int = 0) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection_dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return filled(kind(config), seed)


def t5(seed: int = 0, kind: type = T5EncoderModel) -> Any:
    config_class = UMT5Config if kind is UMT5EncoderModel else T5Config
    return filled(
        kind(config_class(vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)),
        seed,
    )


def qwen2_5_vl(seed: int = 0) -> Any:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    text = sizes | {
        "vocab_size": len(qwen_tokenizer()),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 16}
    return filled(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)), seed)


def qwen3(seed: int = 0) -> Any:
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return filled(Qwen3Model(config), seed)


def _sd3() -> dict[str, Any]:
    encoders = [clip(CLIPTextModelWithProjection, hidden_size=16, seed=seed) for seed in (0, 1)]
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": encoders[0],
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": encoders[1],
        "tokenizer_3": t5_tokenizer(),
        "text_encoder_3": t5(),
    }


def _flux() -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip(),
        "tokenizer_2": t5_tokenizer(),
        "text_encoder_2": t5(),
    }


def _sdxl() -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": clip(),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_2": clip(CLIPTextModelWithProjection, seed=1),
    }


_COMPONENTS = {
    "sd3": _sd3,
    "flux": _flux,
    "wan": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5(kind=UMT5EncoderModel)},
    "pixart": lambda: {"tokenizer": t5_tokenizer(), "text_encoder": t5()},
    "zimage": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen3()},
    "qwen": lambda: {"tokenizer": qwen_tokenizer(), "text_encoder": qwen2_5_vl()},
    "sdxl": _sdxl,
    "sd15": lambda: {"tokenizer": clip_tokenizer(), "text_encoder": clip()},
}


def text_components(name: str) -> dict[str, Any]:
    """The tokenizers and text encoders of a pipeline of `RECIPES`, by the names of its components."""
    return _COMPONENTS[name]()


def with_text(name: str, pipe: Any) -> Any:
    """A pipeline of `RECIPES`, changed to encode its prompts itself."""
    pipe.register_modules(**text_components(name))
    return pipe
