"""What targets read in the output of a network, and how a network is refused that does not give it.

Legend: B batch, K classes, D numbers of an embedding, h and w height and width of a map.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


@dataclass(frozen=True)
class PredictionKind:
    """
    A kind of prediction of a network.

    Args:
        network (`str`): A network that gives it, in words.
        given_by (`str`): A regular expression of the classes of transformers that give it.
        names (`tuple[str, ...]`): What outputs call it; the first that is there is read.
        ndim (`int`): The number of its dimensions.
    """

    network: str
    given_by: str
    names: tuple[str, ...]
    ndim: int

    def find(self, output: ModelOutput) -> torch.Tensor | None:
        """The prediction (B, …) in an output, or None if there is none of this kind."""
        found = (output[name] for name in self.names if name in output)
        return next((each for each in found if each.ndim == self.ndim), None)


LOGITS = PredictionKind("an image classifier, with `logits` (B, K)", "ForImageClassification", ("logits",), 2)
LOGIT_MAPS = PredictionKind(
    "a segmentation network, with `logits` (B, K, h, w)", "ForSemanticSegmentation", ("logits",), 4
)
DEPTH = PredictionKind(
    "a depth estimation network, with `predicted_depth` (B, h, w)", "ForDepthEstimation", ("predicted_depth",), 3
)
EMBEDDINGS = PredictionKind(
    "an image tower of CLIP or SigLIP, with `image_embeds` or `pooler_output` (B, D)",
    "VisionModel",
    ("image_embeds", "pooler_output"),
    2,
)
KINDS = (LOGITS, LOGIT_MAPS, DEPTH, EMBEDDINGS)


def check_network(target: Any, network_config: PreTrainedConfig, *kinds: PredictionKind) -> None:
    """
    Refuse a network whose class is known to give something else, before the first step.

    Args:
        target ([`GuidanceTarget`]): The target that needs it.
        network_config (`PreTrainedConfig`): The configuration; that of a network which was loaded has `architectures`.
        kinds ([`PredictionKind`]): What the target can read.

    Raises:
        ValueError: if the network gives none of `kinds`.
    """
    architecture = (network_config.architectures or [""])[0]
    given = {kind for kind in KINDS if re.search(kind.given_by, architecture)}
    if given and given.isdisjoint(kinds):
        raise ValueError(f"Expected {_network_for(target, kinds)}, but got a {architecture}.")


def read_prediction(target: Any, output: ModelOutput, *kinds: PredictionKind) -> torch.Tensor:
    """
    Read the first of several kinds of predictions that an output has.

    Args:
        target ([`GuidanceTarget`]): The target that needs it.
        output (`ModelOutput`): The output of the network.
        kinds ([`PredictionKind`]): What the target can read.

    Returns:
        `torch.Tensor` of shape (B, …).

    Raises:
        ValueError: if the output has none of them.
    """
    for kind in kinds:
        found = kind.find(output)
        if found is not None:
            return found
    shapes = [f"`{name}` {tuple(value.shape)}" for name, value in output.items() if isinstance(value, torch.Tensor)]
    raise ValueError(f"Expected {_network_for(target, kinds)}, but got one with {' and '.join(shapes) or 'nothing'}.")


def _network_for(target: Any, kinds: tuple[PredictionKind, ...]) -> str:
    return f"{', or '.join(kind.network for kind in kinds)}, for a {type(target).__name__}"
