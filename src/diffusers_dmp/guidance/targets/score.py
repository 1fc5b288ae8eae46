"""Ask for a high score, such as an aesthetic one.

Legend: B batch, K classes, D numbers of an embedding.
"""

import copy
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from .base import GuidanceTarget
from .predictions import EMBEDDINGS, LOGITS, PredictionKind, check_network, read_prediction


class ScoreTarget(GuidanceTarget):
    """
    Ask for a high score of a head on what the network sees: log p is the score.

    ```py
    experts = GuidanceExperts.from_base("openai/clip-vit-large-patch14", num_experts=1)
    target = ScoreTarget(head, normalize=True)  # LAION's aesthetic predictor: see docs/guidance_targets.md
    ```

    Args:
        head (`nn.Module` or any function, *optional*): Computes scores (B,) or (B, 1) of the network's embeddings of images
            (B, D), or, of a classifier, of its logits (B, K). A module is copied, frozen, put in eval mode, and moved to where
            the network is. None for a network with a single logit, which is the score.
        normalize (`bool`): Give the head embeddings of length 1, as most heads on CLIP were trained.

    Raises:
        ValueError: from `prepare`, if the network is of another kind; from `log_likelihood`, if the head does not fit the network
            or its output is of another shape.
    """

    def __init__(self, head: "Callable[[torch.Tensor], torch.Tensor] | None" = None, normalize: bool = False):
        if head is not None and not callable(head):
            raise ValueError(f"Expected `head` to be a module, a function or None, but got {head!r}.")
        if head is None and normalize:
            raise ValueError("Expected `normalize` with a `head`, but got no head.")
        self.head = copy.deepcopy(head).eval().requires_grad_(False) if isinstance(head, nn.Module) else head
        self.normalize = normalize

    def prepare(self, network_config: PreTrainedConfig) -> None:
        check_network(self, network_config, *self._kinds)
        count, architectures = network_config.num_labels, network_config.architectures or [""]
        if self.head is None and count > 1 and re.search(LOGITS.given_by, architectures[0]):
            raise ValueError(
                f"Expected a network with a single logit for a ScoreTarget without a `head`, but got a {architectures[0]} with "
                f"{count}."
            )

    @property
    def _kinds(self) -> tuple[PredictionKind, ...]:
        """What is scored: without a head, a logit itself."""
        return (LOGITS,) if self.head is None else (EMBEDDINGS, LOGITS)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        seen = read_prediction(self, output, *self._kinds)  # (B, D or K)
        scores = seen if self.head is None else self._scores(self.head, seen)
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else f"a {type(scores).__name__}"
        if shape not in ((len(seen),), (len(seen), 1)):
            raise ValueError(
                f"Expected {'the `logits`' if self.head is None else 'the output of `head`'} to be one score for each image, of "
                f"shape ({len(seen)},) or ({len(seen)}, 1), but got {shape}."
            )
        return scores.flatten()

    def _scores(self, head: "Callable[[torch.Tensor], torch.Tensor]", seen: torch.Tensor) -> torch.Tensor:
        """The output of the head, on the device and in the dtype of what the network sees."""
        if isinstance(head, nn.Module):
            head.to(seen.device, seen.dtype)
        try:
            return head(F.normalize(seen, dim=-1) if self.normalize else seen)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of layers of another size
            raise ValueError(
                f"Expected `head` to take what the network gives, of shape {tuple(seen.shape)}, but got: {error}"
            ) from error
