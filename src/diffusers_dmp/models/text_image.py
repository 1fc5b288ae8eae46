"""Models of images and text, CLIP and SigLIP of transformers: each of their two towers by itself.
https://arxiv.org/abs/2103.00020, https://arxiv.org/abs/2303.15343

Legend: N prompts, D numbers of an embedding.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextModel,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from ..saving.weight_files import check_saved_folder

logger = logging.getLogger(__name__)

TOWERS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {  # of images and of text
    "CLIPModel": (CLIPVisionModelWithProjection, CLIPTextModelWithProjection),
    "SiglipModel": (SiglipVisionModel, SiglipTextModel),
}


def has_towers(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a whole model of images and text."""
    return (config.architectures or [""])[0] in TOWERS


def load_image_tower(name_or_path: str, config: PreTrainedConfig, **hub_arguments: Any) -> PreTrainedModel:
    """
    Load the tower of images alone, whose output has the embeddings of images.

    Args:
        name_or_path (`str`): The folder or Hub id of the whole model.
        config (`PreTrainedConfig`): Its configuration; see [`has_towers`].
        hub_arguments: `revision` and those in `HUB_ARGUMENTS`, for the Hub.

    Raises:
        ValueError: if a weight is missing, or the tower has no embeddings of whole images.
    """
    if config.vision_config.to_dict().get("vision_use_head") is False:
        raise ValueError(
            f"Expected {name_or_path!r} to have embeddings of images, but got a SigLIP without its pooling head."
        )
    return _load_tower(TOWERS[config.architectures[0]][0], name_or_path, image_tower_config(config), **hub_arguments)


def image_tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the tower of images, of that of the whole model."""
    return _tower_config(config, "vision_config")


def _tower_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    tower_config = copy.deepcopy(getattr(config, name))
    if "projection_dim" in config.to_dict():  # of CLIP, the whole model's own; the towers' is often not up to date
        tower_config.projection_dim = config.projection_dim
    return tower_config


def _load_tower(
    tower_class: type[PreTrainedModel], name_or_path: str, config: PreTrainedConfig, **hub_arguments: Any
) -> Any:
    """Load a part of a checkpoint, in float32 and eval mode, without a report on the other parts."""
    with _only_errors():
        tower, found = tower_class.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True, **hub_arguments
        )
    for name in sorted(found["missing_keys"]):
        raise ValueError(f"Expected {name_or_path!r} to hold a {tower_class.__name__}, but {name!r} is missing.")
    return tower.eval()


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silence the reports of transformers within a `with` block."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class PromptEmbeddings:
    """
    Embeddings of prompts, and what makes a logit of them and an image's.

    Args:
        embeds (`torch.Tensor` of shape (N, D)): In float32, on the CPU.
        logit_scale (`float`): What a cosine is multiplied by.
        logit_bias (`float`, *optional*): What is added then; None for CLIP.
        image_config (`PreTrainedConfig`): The configuration of the tower of images that they are comparable with.
    """

    embeds: torch.Tensor
    logit_scale: float
    logit_bias: float | None
    image_config: PreTrainedConfig


@torch.no_grad()
def embed_prompts(
    name_or_path: str, prompts: list[str], tokenizer: str | None = None, **hub_arguments: Any
) -> PromptEmbeddings:
    """
    Embed prompts with the tower of text, which is loaded for this alone.

    Args:
        name_or_path (`str`): The folder or Hub id of a CLIP or SigLIP.
        prompts (`list[str]` of length N): Longer ones than the model reads are cut off, with a warning.
        tokenizer (`str`, *optional*): The folder or Hub id of the tokenizer; by default the model's.
        hub_arguments: `revision` and those in `HUB_ARGUMENTS`, for the Hub.

    Raises:
        ValueError: if it is no such model, or a part of it is missing.
    """
    try:
        check_saved_folder(name_or_path, components=False)
        config = AutoConfig.from_pretrained(name_or_path, **hub_arguments)
        if not has_towers(config):
            raise ValueError(
                f"Expected {name_or_path!r} to be one of {', '.join(TOWERS)}, but got the architectures "
                f"{config.architectures}."
            )
        tower_class = TOWERS[config.architectures[0]][1]
        tower = _load_tower(tower_class, name_or_path, _tower_config(config, "text_config"), **hub_arguments)
        has_bias = tower_class is SiglipTextModel
        logit = _load_tower(_BiasedLogit if has_bias else _Logit, name_or_path, config, **hub_arguments)
        of_tokenizer = {name: each for name, each in hub_arguments.items() if tokenizer is None or name != "revision"}
        loaded = load_tokenizer(tokenizer or name_or_path, config.text_config, **of_tokenizer)
    except (OSError, ImportError) as error:  # of a tokenizer that needs sentencepiece
        raise ValueError(
            f"Expected {name_or_path!r} to be the folder or Hub id of a CLIP or SigLIP with its tokenizer, but got: {error}"
        ) from error
    # SigLIP was trained on lower case; the tokenizer of SigLIP 2 leaves texts as they are
    texts = [prompt.lower() for prompt in prompts] if has_bias else prompts
    output = tower(_tokens(loaded, texts, config.text_config.max_position_embeddings))
    return PromptEmbeddings(
        embeds=output["pooler_output" if has_bias else "text_embeds"],
        logit_scale=logit.logit_scale.exp().item(),
        logit_bias=logit.logit_bias.item() if has_bias else None,
        image_config=image_tower_config(config),
    )


def load_tokenizer(name_or_path: str, text_config: PreTrainedConfig, **hub_arguments: Any) -> Any:
    """
    Load the tokenizer of a tower of text.

    Args:
        name_or_path (`str`): The folder or Hub id of the tokenizer.
        text_config (`PreTrainedConfig`): The tower's configuration.
        hub_arguments: `revision` and those in `HUB_ARGUMENTS`, for the Hub.

    Raises:
        OSError: if there is none.
        ValueError: if it has less than half of the tower's vocabulary. Where its files are missing, transformers makes one that
            knows no words.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub_arguments)
    if len(tokenizer) < text_config.vocab_size / 2:
        raise ValueError(
            f"Expected the tokenizer in {name_or_path!r} to have the model's vocabulary of {text_config.vocab_size} tokens, but got "
            f"{len(tokenizer)}; if its files are missing, they may be those of the model that it was made from."
        )
    return tokenizer


def _tokens(tokenizer: Any, prompts: list[str], max_length: int) -> torch.Tensor:
    """Tokens (N, max_length), padded on the right to the full length, as SigLIP was trained; CLIP looks at no padding."""
    cut = sum(len(ids) > max_length for ids in tokenizer(prompts, verbose=False)["input_ids"])
    if cut:
        logger.warning("%d of %d prompts are longer than the %d tokens that are read.", cut, len(prompts), max_length)
    settings = {"padding": "max_length", "padding_side": "right", "truncation": True, "max_length": max_length}
    return tokenizer(prompts, return_tensors="pt", **settings)["input_ids"]


class _Logit(PreTrainedModel):
    """The scale of the logits, which belongs to neither tower."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.post_init()


class _BiasedLogit(PreTrainedModel):
    """The scale and the bias of SigLIP's logits."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))
        self.post_init()
