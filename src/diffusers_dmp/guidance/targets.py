"""What guidance asks for: log p(y | x) of a class, a depth map or a segmentation, from the output of a vision network.

To ask for something else, derive from [`GuidanceTarget`].

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


class ClassTarget(GuidanceTarget):
    """
    Ask for classes of an image classification network.

    Args:
        labels (`int`, `str`, a list of B of either, or `torch.LongTensor` of shape (B,)): One class for all images, or one for
            each image, by index or by name. Of a name with synonyms, "tench, Tinca tinca", one of them is enough.

    Raises:
        ValueError: from `prepare`, if a class is unknown; the message lists similar names.
    """

    def __init__(self, labels: "int | str | list[int] | list[str] | torch.Tensor"):
        self.labels = labels

    def prepare(self, network_config: PreTrainedConfig) -> None:
        labels = self.labels.tolist() if isinstance(self.labels, torch.Tensor) else self.labels
        labels = labels if isinstance(labels, (list, tuple)) else [labels]
        self.indices = torch.tensor([self._index(label, network_config.id2label) for label in labels])

    @staticmethod
    def _index(label: "int | str", id2label: dict[int, str]) -> int:
        """The index of a class that is given by index or by name."""
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
        self.indices = self.indices.to(log_probs.device)
        return log_probs.gather(1, self.indices.expand(len(log_probs))[:, None])[:, 0]


class DepthTarget(GuidanceTarget):
    """
    Ask for a depth map, as a depth estimation network predicts it: log p = -mean (d - d*)².

    Args:
        depth (`torch.Tensor` of shape (B or 1, h, w)): d*, in the units and size of the network's predictions, for example its
            prediction for a clean image.

    Raises:
        ValueError: from `log_likelihood`, if the network predicts depth maps of another size.
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
    Ask for a map of classes of a segmentation network: log p is the mean of log p(class) over the pixels.

    Args:
        classes (`torch.LongTensor` of shape (B or 1, h, w)): The class of each pixel, in the size of the network's logits.
        ignore_index (`int`): Pixels with this value are left free.

    Raises:
        ValueError: from `prepare`, if the network has no such class; from `log_likelihood`, if its logits are of another size.
    """

    def __init__(self, classes: torch.Tensor, ignore_index: int = -100):
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
