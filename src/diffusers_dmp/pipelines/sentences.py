"""The sentences that a pipeline is called with, or their embeddings, and what a transformer needs them to be.

Legend: B batch, L tokens, D width of the text.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def given_embeddings(
    name: str, prompt: Any, given: Sequence[torch.Tensor | None], config: Mapping[str, Any]
) -> list[torch.Tensor] | None:
    """
    Check the embeddings that are given in the place of prompts.

    Args:
        name (`str`): The argument that they replace: 'prompt' or 'negative_prompt'.
        prompt (`str` or `list[str]`, *optional*): What that argument is.
        given (`Sequence[torch.Tensor]`): Embeddings of tokens (B, L, D) and of sentences (B, D); each may be None.
        config (`Mapping`): The transformer's.

    Returns:
        The embeddings; None if there is a prompt to encode.

    Raises:
        ValueError: if there are both a prompt and embeddings, or neither, or shapes do not fit.
    """
    named = dict(zip((f"{name}_embeds", f"{name.replace('prompt', 'pooled_prompt')}_embeds"), given, strict=True))
    embeddings = [each for each in given if each is not None]
    both = " and ".join(f"`{key}`" for key in named)
    if (prompt is None) == (not embeddings):
        raise ValueError(f"Expected `{name}`, or {both}, but got {'none of them' if prompt is None else 'both'}.")
    if not embeddings:
        return None
    if len(embeddings) < len(named):
        missing = next(key for key, value in named.items() if value is None)
        raise ValueError(f"Expected {both}, but got no `{missing}`.")
    shapes = [("B", "L", config["joint_attention_dim"]), ("B", config["pooled_projection_dim"])]
    for key, value, shape in zip(named, embeddings, shapes, strict=True):
        if value.ndim != len(shape) or value.shape[-1] != shape[-1]:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"Expected `{key}` to be of shape ({expected}), but got {tuple(value.shape)}.")
    if len(embeddings[0]) != len(embeddings[1]):
        numbers = " and ".join(str(len(each)) for each in embeddings)
        raise ValueError(f"Expected as many {both.replace('and', 'as')}, but got {numbers}.")
    return embeddings


def check_text_width(text_encoder: PreTrainedModel | None, transformer: ModelMixin | None) -> None:
    """Check that a transformer takes the embeddings of a text encoder."""
    if text_encoder is None or transformer is None:
        return
    width = text_encoder.config.hidden_size
    expected = {name: transformer.config[name] for name in ("joint_attention_dim", "pooled_projection_dim")}
    for name, value in expected.items():
        if value != width:
            raise ValueError(
                f"Expected a `text_encoder` of the hidden size {value}, the transformer's `{name}`, but got one of {width}."
            )


def texts_of(name: str, prompt: Any) -> list[str]:
    """One or more prompts, as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise ValueError(f"Expected `{name}` to be a text or a list of texts, but got {prompt!r}.")
    return list(prompts)


def negative_first(negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """A batch of 2·B for guidance; a single negative prompt is for all."""
    if len(negative) not in (1, len(positive)):
        raise ValueError(
            f"Expected `negative_prompt` to be one text or {len(positive)} of them, but got {len(negative)}."
        )
    if negative.shape[1:] != positive.shape[1:]:
        raise ValueError(
            f"Expected embeddings of negative prompts of the shape {tuple(positive.shape[1:])} as those of prompts, but got "
            f"{tuple(negative.shape[1:])}."
        )
    return torch.cat([negative.expand_as(positive), positive])


def warn_of_cut_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> None:
    """Say which prompt is longer than the transformer was trained with."""
    longest, prompt = max((len(tokens), prompt) for tokens, prompt in zip(tokenizer(prompts)["input_ids"], prompts))
    if longest > length:
        warnings.warn(
            f"The end of {prompt!r} is left out: it has {longest} tokens, and `max_sequence_length` is {length}.",
            stacklevel=4,
        )
