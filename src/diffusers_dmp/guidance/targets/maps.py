"""Ask for a depth map, or for a segmentation.

Legend: B batch, K classes, h and w height and width of a map.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from .base import GuidanceTarget, check_classes, check_images, class_range
from .predictions import DEPTH, LOGIT_MAPS, check_network, read_prediction


class DepthTarget(GuidanceTarget):
    """
    Ask for a depth map, as a depth estimation network predicts it: log p = -mean (d - d*)².

    Args:
        depth (`torch.Tensor` or `np.ndarray` of shape (B or 1, h, w) or (h, w)): d*, in the units and size of the network's
            predictions, for example its prediction for a clean image.

    Raises:
        ValueError: if `depth` is not finite or of another shape; from `prepare`, if the network is of another kind; from
            `log_likelihood`, if it predicts depth maps of another size.
    """

    def __init__(self, depth: "torch.Tensor | np.ndarray"):
        self.depth = _as_maps("depth", depth).float()
        if not self.depth.isfinite().all():
            raise ValueError("Expected `depth` to be finite, but got values that are infinite or not a number.")

    def prepare(self, network_config: PreTrainedConfig) -> None:
        check_network(self, network_config, DEPTH)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        predicted = read_prediction(self, output, DEPTH)  # (B, h, w)
        _check_map("depth", self.depth, predicted.shape, 'mode="bilinear"')
        self.depth = self.depth.to(predicted.device)
        return -((predicted - self.depth) ** 2).flatten(1).mean(1)


class SegmentationTarget(GuidanceTarget):
    """
    Ask for a map of classes of a segmentation network: log p is the mean of log p(class) over the pixels.

    Args:
        classes (`torch.LongTensor` or `np.ndarray` of shape (B or 1, h, w) or (h, w)): The class of each pixel, in the size of
            the network's logits.
        ignore_index (`int`): Pixels with this value are left free.

    Raises:
        ValueError: if `classes` are no integers; from `prepare`, if the network is of another kind or has no such class; from
            `log_likelihood`, if its logits are of another size.
    """

    def __init__(self, classes: "torch.Tensor | np.ndarray", ignore_index: int = -100):
        given = _as_maps("classes", classes)
        self.classes = given.long()
        if (self.classes != given).any():
            raise ValueError("Expected `classes` to be integers, but got fractions.")
        self.ignore_index = ignore_index
        self.highest = max([0, *self.classes[self.classes != ignore_index].unique().tolist()])

    def prepare(self, network_config: PreTrainedConfig) -> None:
        check_network(self, network_config, LOGIT_MAPS)
        asked = self.classes[self.classes != self.ignore_index]
        count = network_config.num_labels
        if len(asked) == 0 or asked.min() < 0 or (count and asked.max() >= count):
            raise ValueError(
                f"Expected `classes` to be {class_range(count)} or {self.ignore_index}, but got "
                f"{self.classes.unique().tolist()}."
            )

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        logits = read_prediction(self, output, LOGIT_MAPS)  # (B, K, h, w)
        check_classes("classes", self.highest, logits.shape[1])
        _check_map("classes", self.classes, (len(logits), *logits.shape[2:]), 'mode="nearest"')
        self.classes = self.classes.to(logits.device)
        classes = self.classes.expand(len(logits), -1, -1)
        losses = F.cross_entropy(logits, classes, ignore_index=self.ignore_index, reduction="none")
        counts = (classes != self.ignore_index).flatten(1).sum(1).clamp(min=1)
        return -losses.flatten(1).sum(1) / counts


def _as_maps(name: str, maps: "torch.Tensor | np.ndarray") -> torch.Tensor:
    """A map (h, w), or one for each image (B, h, w), as (B or 1, h, w)."""
    maps = torch.as_tensor(maps)
    if maps.ndim not in (2, 3):
        raise ValueError(f"Expected `{name}` to have the shape (B, h, w) or (h, w), but got {tuple(maps.shape)}.")
    return maps if maps.ndim == 3 else maps[None]


def _check_map(name: str, target: torch.Tensor, shape: "tuple[int, ...]", mode: str) -> None:
    """Refuse a map of another height and width than `shape` (B, h, w), or for another number of images."""
    check_images(name, len(target), shape[0])
    size = tuple(shape[1:])
    if tuple(target.shape[1:]) != size:
        raise ValueError(
            f"Expected `{name}` to have the network's size {size}, but got {tuple(target.shape[1:])}. A map (B, h, w) is resized by "
            f"`F.interpolate({name}[:, None].float(), {size}, {mode})[:, 0]`."
        )
