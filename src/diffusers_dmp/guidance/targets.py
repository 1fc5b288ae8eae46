"""What guidance asks for: log p(y | x) of a class, a depth map or a segmentation, from the output of a vision network.

To ask for something else, derive from [`GuidanceTarget`].

Legend: B batch, K classes, h and w height and width of a map.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..models.class_names import find_class, label_list


class GuidanceTarget(ABC):
    """
    Base class of what guidance can ask for.

    [`GuidedScheduler`] calls `prepare` once, and `log_likelihood` at every step that it guides. The gradient of the
    log-likelihood with respect to the noisy images is the guidance.
    """

    def prepare(self, network_config: PreTrainedConfig) -> None:  # noqa: B027  optional
        """
        Check the target and look up its classes, before the first step.

        Args:
            network_config (`PreTrainedConfig`): The configuration of the network that guides.
        """

    @abstractmethod
    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        """
        Compute log p(y | x) up to a constant.

        Args:
            output (`ModelOutput`): The network's output for a batch of B images.

        Returns:
            `torch.Tensor` of shape (B,): For each image, and depending on no other image.
        """

    def log_likelihood_of_frames(self, outputs: list[ModelOutput]) -> torch.Tensor:
        """
        Compute log p(y | x) of videos: the mean over their frames, so that a scale means the same for any number of them.

        Args:
            outputs (`list[ModelOutput]`): The network's output for each frame of B videos.

        Returns:
            `torch.Tensor` of shape (B,).
        """
        return torch.stack([self.log_likelihood(output) for output in outputs]).mean(0)


class ClassTarget(GuidanceTarget):
    """
    Ask for classes of an image classification network.

    Args:
        labels (`int`, `str`, or a list, array or tensor of shape (B,) of either): One class for all images, or one for each
            image, by index or by name. Of a name with synonyms, "tench, Tinca tinca", one of them is enough.

    Raises:
        ValueError: from `prepare`, if a class is unknown (the message lists similar names), or several have the name.
    """

    def __init__(self, labels: "int | str | list[int] | list[str] | np.ndarray | torch.Tensor"):
        self.labels = labels

    def prepare(self, network_config: PreTrainedConfig) -> None:
        names, count = network_config.id2label, network_config.num_labels
        labels = [
            find_class(label, names, "labels") if isinstance(label, str) else label
            for label in label_list(self.labels, "labels")
        ]
        _check_classes("labels", min(labels), count)
        _check_classes("labels", max(labels), count)
        self.indices, self.highest = torch.tensor(labels), max(labels)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        log_probs = F.log_softmax(output.logits, dim=-1)  # (B, K)
        _check_classes("labels", self.highest, log_probs.shape[-1])
        _check_batch("labels", len(self.indices), len(log_probs))
        self.indices = self.indices.to(log_probs.device)
        return log_probs.gather(1, self.indices.expand(len(log_probs))[:, None])[:, 0]


class DepthTarget(GuidanceTarget):
    """
    Ask for a depth map, as a depth estimation network predicts it: log p = -mean (d - d*)².

    Args:
        depth (`torch.Tensor` or `np.ndarray` of shape (B or 1, h, w) or (h, w)): d*, in the units and size of the network's
            predictions, for example its prediction for a clean image.

    Raises:
        ValueError: if `depth` is not finite or of another shape; from `log_likelihood`, if the network predicts depth maps of another size.
    """

    def __init__(self, depth: "torch.Tensor | np.ndarray"):
        self.depth = _as_maps("depth", depth).float()
        if not self.depth.isfinite().all():
            raise ValueError("Expected `depth` to be finite, but got values that are infinite or not a number.")

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        predicted = output.predicted_depth  # (B, h, w)
        _check_map("depth", self.depth, predicted.shape)
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
        ValueError: if `classes` are no integers; from `prepare`, if the network has no such class; from `log_likelihood`, if its logits are of another size.
    """

    def __init__(self, classes: "torch.Tensor | np.ndarray", ignore_index: int = -100):
        given = _as_maps("classes", classes)
        self.classes = given.long()
        if (self.classes != given).any():
            raise ValueError("Expected `classes` to be integers, but got fractions.")
        self.ignore_index = ignore_index
        self.highest = max([0, *self.classes[self.classes != ignore_index].unique().tolist()])

    def prepare(self, network_config: PreTrainedConfig) -> None:
        asked = self.classes[self.classes != self.ignore_index]
        count = network_config.num_labels
        if len(asked) == 0 or asked.min() < 0 or (count and asked.max() >= count):
            raise ValueError(
                f"Expected `classes` to be {_class_range(count)} or {self.ignore_index}, but got "
                f"{self.classes.unique().tolist()}."
            )

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        logits = output.logits  # (B, K, h, w)
        _check_classes("classes", self.highest, logits.shape[1])
        _check_map("classes", self.classes, (len(logits), *logits.shape[2:]))
        self.classes = self.classes.to(logits.device)
        classes = self.classes.expand(len(logits), -1, -1)
        losses = F.cross_entropy(logits, classes, ignore_index=self.ignore_index, reduction="none")
        counts = (classes != self.ignore_index).flatten(1).sum(1).clamp(min=1)
        return -losses.flatten(1).sum(1) / counts


class WeightedTargets(GuidanceTarget):
    """
    Ask one network for several things at once: log p = Σ wᵢ·log pᵢ.

    To ask several networks, put one [`GuidedScheduler`] around another.

    Args:
        targets (`list[tuple[GuidanceTarget, float]]`): Targets and their weights wᵢ.
    """

    def __init__(self, targets: "list[tuple[GuidanceTarget, float]]"):
        self.targets = targets

    def prepare(self, network_config: PreTrainedConfig) -> None:
        for target, _ in self.targets:
            target.prepare(network_config)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        return torch.stack([weight * target.log_likelihood(output) for target, weight in self.targets]).sum(0)


def _as_maps(name: str, maps: "torch.Tensor | np.ndarray") -> torch.Tensor:
    """A map (h, w), or one for each image (B, h, w), as (B or 1, h, w)."""
    maps = torch.as_tensor(maps)
    if maps.ndim not in (2, 3):
        raise ValueError(f"Expected `{name}` to have the shape (B, h, w) or (h, w), but got {tuple(maps.shape)}.")
    return maps if maps.ndim == 3 else maps[None]


def _check_classes(name: str, index: int, count: int) -> None:
    """Refuse a class that a network with `count` of them does not have; 0 if the number is not known yet."""
    if index < 0 or (count and index >= count):
        raise ValueError(f"Expected `{name}` to be {_class_range(count)}, but got {index}.")


def _class_range(count: int) -> str:
    """The classes that there are, in words."""
    return f"in [0, {count - 1}]" if count else "at least 0"


def _check_batch(name: str, number: int, batch_size: int) -> None:
    """Refuse a target for another number of images than 1 or B."""
    if number not in (1, batch_size):
        raise ValueError(f"Expected `{name}` to be for 1 or {batch_size} images, but got {number}.")


def _check_map(name: str, target: torch.Tensor, shape: "tuple[int, ...]") -> None:
    """Refuse a map of another height and width than `shape` (B, h, w), or for another number of images."""
    _check_batch(name, len(target), shape[0])
    if tuple(target.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            f"Expected `{name}` to have the network's size {tuple(shape[1:])}, but got {tuple(target.shape[1:])}."
        )
