"""CLIP score: how well images fit the prompts that they were sampled from. https://arxiv.org/abs/2104.08718

Legend: B batch, H and W height and width, D features.
"""

import logging
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import AutoImageProcessor, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

from ..models.text_image import load_tokenizer
from ..models.vision import load_network, network_sha256
from ..training.data.prompts import prompts_of

logger = logging.getLogger(__name__)


class ClipScorer(torch.nn.Module):
    """
    Score images and their prompts with a CLIP of transformers.

    Args:
        name_or_path (`str`): The model's folder or Hub id, such as `openai/clip-vit-base-patch32`, with its tokenizer and image
            processor.

    Raises:
        ValueError: if it is no CLIP, or has no tokenizer or no image processor.
    """

    def __init__(self, name_or_path: "str | os.PathLike"):
        super().__init__()
        name = os.fspath(name_or_path)
        try:
            network = load_network(name, with_text=True)
            if not isinstance(network, CLIPModel):
                raise ValueError(
                    f"Expected `clip` to be a CLIPModel of transformers, but got a {type(network).__name__}."
                )
            self.network = network.requires_grad_(False)
            self.tokenizer = load_tokenizer(name, network.config.text_config)
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.processor_settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        except OSError as error:
            raise ValueError(
                f"Expected `clip` to be the folder or Hub id of a CLIP with its tokenizer and image processor, but got {name!r}: "
                f"{error}"
            ) from error
        self.max_length = self.network.config.text_config.max_position_embeddings
        self.name = os.path.basename(name.rstrip("/")) if os.path.exists(name) else name

    @property
    def fingerprint(self) -> dict[str, str]:
        """The CLIP's name, and a hash of its weights, its vocabulary and its image processor's settings."""
        settings = {"vocabulary": self.tokenizer.get_vocab(), "processor": self.processor_settings}
        return {"clip": self.name, "clip_sha256": network_sha256(self.network, settings)}

    @torch.inference_mode()
    def forward(self, images: np.ndarray, prompts: Sequence[str]) -> torch.Tensor:
        """
        Score each image and its prompt: max(100·cos(image, prompt), 0).

        Args:
            images (`np.ndarray` of shape (B, H, W, 3)): uint8.
            prompts (`Sequence[str]` of length B): Longer ones than the CLIP reads are cut off.

        Returns:
            `torch.Tensor` of shape (B,).
        """
        device = self.network.device
        pixels = self.processor(list(images), input_data_format="channels_last", return_tensors="pt").to(device)
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(device)
        output = self.network(**tokens, **pixels)
        # embeddings (B, D) of length 1
        return (100 * (output.image_embeds * output.text_embeds).sum(-1)).clamp(min=0)

    def count_long(self, prompts: Iterable[str]) -> int:
        """Count the prompts that are longer than the CLIP reads."""
        return sum(len(ids) > self.max_length for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"])


def clip_score(scorer: ClipScorer, batches: Iterable[np.ndarray], prompts: Sequence[str]) -> float:
    """
    Compute the mean score of images and their prompts.

    Args:
        scorer ([`ClipScorer`]): On the device to compute on.
        batches (of `np.ndarray` of shape (B, H, W, 3)): All images in order, uint8.
        prompts (`Sequence[str]`): Image i has prompt i modulo their number.
    """
    cut = scorer.count_long(prompts)
    if cut:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the CLIP reads.", cut, len(prompts), scorer.max_length
        )
    scores, count = [], 0
    # not in TF32, which is the default of convolutions on a GPU
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for images in batches:
            scores.append(scorer(images, prompts_of(range(count, count + len(images)), prompts)).cpu())
            count += len(images)
    return float(torch.cat(scores).double().mean())
