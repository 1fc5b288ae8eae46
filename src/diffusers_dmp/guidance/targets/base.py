"""The base class of what guidance can ask for.

Legend: B batch.
"""

from abc import ABC, abstractmethod

import torch
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

    def log_likelihood_of_frames(self, outputs: list[ModelOutput]) -> torch.Tensor:
        """
        Compute log p(y | x) of videos: the mean over their frames, so that a scale means the same for any number of them.

        Args:
            outputs (`list[ModelOutput]`): The network's output for each frame of B videos.

        Returns:
            `torch.Tensor` of shape (B,).
        """
        return torch.stack([self.log_likelihood(output) for output in outputs]).mean(0)


def check_images(name: str, number: int, batch_size: int) -> None:
    """Refuse a target for another number of images than 1 or B."""
    if number not in (1, batch_size):
        raise ValueError(f"Expected `{name}` to be for 1 or {batch_size} images, but got {number}.")


def check_classes(name: str, index: int, count: int) -> None:
    """Refuse a class that a network with `count` of them does not have; 0 if the number is not known yet."""
    if index < 0 or (count and index >= count):
        raise ValueError(f"Expected `{name}` to be {class_range(count)}, but got {index}.")


def class_range(count: int) -> str:
    """The classes that there are, in words."""
    return f"in [0, {count - 1}]" if count else "at least 0"
