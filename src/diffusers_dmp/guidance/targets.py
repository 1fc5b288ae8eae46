"""What guidance asks of a vision model: log p(y | x) of a class, a depth map or a segmentation, up to a constant.

A new one is a class with the two methods of [`GuidanceTarget`].

Legend: B batch, K classes, h and w height and width of a map.
"""

import difflib
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput


class GuidanceTarget(ABC):
    """
    Something to ask for. [`GuidedScheduler`] calls `prepare` once, and `log_likelihood` at every step that it guides, on the
    network's output for the noisy images; its gradient by them is the guidance.
    """

    def prepare(self, network_config: PreTrainedConfig) -> None:  # noqa: B027  most need nothing
        """Whatever can be checked or looked up beforehand, in the network's configuration."""

    @abstractmethod
    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        """log p(y | x) (B,), up to a constant, each image's from its own output alone."""


class ClassTarget(GuidanceTarget):
    """
    Classes of an image classification model.

    Args:
        labels (`int`, `str`, a list of B of either, or `torch.LongTensor` of shape (B,)): One class for all images or one for
            each, by index or by name (one of the synonyms between commas, or all of them).

    Raises:
        ValueError: from `prepare`, if a class is unknown; close names are listed.
    """

    def __init__(self, labels: "int | str | list[int] | list[str] | torch.LongTensor"):
        self.labels = labels

    def prepare(self, network_config: PreTrainedConfig) -> None:
        labels = self.labels.tolist() if isinstance(self.labels, torch.Tensor) else self.labels
        labels = labels if isinstance(labels, (list, tuple)) else [labels]
        self.indices = torch.tensor([self._index(label, network_config.id2label) for label in labels])

    @staticmethod
    def _index(label: "int | str", id2label: dict[int, str]) -> int:
        if not isinstance(label, str):
            if label not in id2label:
                raise ValueError(f"Expected `labels` to be in [0, {len(id2label) - 1}], but got {label}.")
            return int(label)
        indices = {name.strip(): index for index, names in id2label.items() for name in names.split(",")}
        indices |= {names: index for index, names in id2label.items()}
        if label not in indices:
            close = difflib.get_close_matches(label, indices, n=5) or list(indices)[:5]
            raise ValueError(f"Expected `labels` to be classes of the network such as {close}, but got {label!r}.")
        return indices[label]

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        log_probs = F.log_softmax(output.logits, dim=-1)  # (B, K)
        _check_batch("labels", len(self.indices), len(log_probs))
        self.indices = self.indices.to(log_probs.device)  # once
        return log_probs.gather(1, self.indices.expand(len(log_probs))[:, None])[:, 0]


class DepthTarget(GuidanceTarget):
    """
    A depth map, as the same model sees it in a clean image: log p = -mean (d - d*)², a Gaussian's.

    Args:
        depth (`torch.Tensor` of shape (B or 1, h, w)): In the network's own units and size.

    Raises:
        ValueError: if it is of another size than what the network predicts.
    """

    def __init__(self, depth: torch.Tensor):
        self.depth = depth.float()

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        predicted = output.predicted_depth  # (B, h, w)
        _check_map("depth", self.depth, predicted.shape)
        self.depth = self.depth.to(predicted.device)
        return -((predicted - self.depth) ** 2).flatten(1).mean(1)


class SegmentationTarget(GuidanceTarget):
    """
    A map of classes: log p = the mean over its pixels of log p(class).

    Args:
        classes (`torch.LongTensor` of shape (B or 1, h, w)): In the size of the network's logits.
        ignore_index (`int`): Pixels of this value ask for nothing.

    Raises:
        ValueError: if it is of another size than the network's logits, or has other classes.
    """

    def __init__(self, classes: torch.LongTensor, ignore_index: int = -100):
        self.classes = classes.long()
        self.ignore_index = ignore_index

    def prepare(self, network_config: PreTrainedConfig) -> None:
        asked = self.classes[self.classes != self.ignore_index]
        if len(asked) == 0 or asked.min() < 0 or asked.max() >= network_config.num_labels:
            raise ValueError(
                f"Expected `classes` to be in [0, {network_config.num_labels - 1}] or {self.ignore_index}, but got "
                f"{self.classes.unique().tolist()}."
            )

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        logits = output.logits  # (B, K, h, w)
        _check_map("classes", self.classes, (len(logits), *logits.shape[2:]))
        self.classes = self.classes.to(logits.device)
        classes = self.classes.expand(len(logits), -1, -1)
        losses = F.cross_entropy(logits, classes, ignore_index=self.ignore_index, reduction="none")
        counts = (classes != self.ignore_index).flatten(1).sum(1).clamp(min=1)
        return -losses.flatten(1).sum(1) / counts


class WeightedTargets(GuidanceTarget):
    """
    Several things asked of one network at once: log p = Σ wᵢ·log pᵢ. (Of several networks: one [`GuidedScheduler`] around
    another.)

    Args:
        targets (`list[tuple[GuidanceTarget, float]]`): Each with its weight.
    """

    def __init__(self, targets: "list[tuple[GuidanceTarget, float]]"):
        self.targets = targets

    def prepare(self, network_config: PreTrainedConfig) -> None:
        for target, _ in self.targets:
            target.prepare(network_config)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        return sum(weight * target.log_likelihood(output) for target, weight in self.targets)


def _check_batch(name: str, asked: int, batch_size: int) -> None:
    if asked not in (1, batch_size):
        raise ValueError(f"Expected `{name}` to be for 1 or {batch_size} images, but got {asked}.")


def _check_map(name: str, target: torch.Tensor, shape: "tuple[int, ...]") -> None:
    _check_batch(name, len(target), shape[0])
    if tuple(target.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            f"Expected `{name}` to have the network's size {tuple(shape[1:])}, but got {tuple(target.shape[1:])}."
        )
