"""Several targets at once, and one for each frame of a video.

Legend: B batch, f frames.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from .base import GuidanceTarget


class WeightedTargets(GuidanceTarget):
    """
    Ask one network for several things at once: log p = Σ wᵢ·log pᵢ.

    To ask several networks, put one [`GuidedScheduler`] around another.

    Args:
        targets (`list[tuple[GuidanceTarget, float]]`): Targets and their weights wᵢ. With a negative weight, a target is avoided.

    Raises:
        ValueError: if there is none, or one is not a target with a finite weight.
    """

    def __init__(self, targets: "Sequence[tuple[GuidanceTarget, float]]"):
        for each in targets:
            is_pair = isinstance(each, (tuple, list)) and len(each) == 2 and isinstance(each[1], Real)
            if not is_pair or not math.isfinite(each[1]):
                raise ValueError(
                    f"Expected `targets` to be pairs of a target and its finite weight, but got {each!r}."
                )
        _check_targets([target for target, _ in targets])
        self.targets = targets

    def prepare(self, network_config: PreTrainedConfig) -> None:
        for target, _ in self.targets:
            target.prepare(network_config)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        return self._sum(target.log_likelihood(output) for target, _ in self.targets)

    def log_likelihood_of_frames(self, outputs: list[ModelOutput]) -> torch.Tensor:
        # not the mean over frames of the sum: a target may look at all frames together
        return self._sum(target.log_likelihood_of_frames(outputs) for target, _ in self.targets)

    def _sum(self, log_likelihoods: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.stack([weight * each for each, (_, weight) in zip(log_likelihoods, self.targets)]).sum(0)


class FrameTargets(GuidanceTarget):
    """
    Ask for something else in each frame of a video: log p is the mean of the frames'.

    ```py
    target = FrameTargets([ClassTarget("caterpillar"), ClassTarget("butterfly")])  # of the first and the last frame
    GuidedScheduler.for_pipeline(pipe, experts, target, frames=[0, -1])
    ```

    Args:
        targets (`list[GuidanceTarget]` of length f): One for each frame that is decoded, in their order.

    Raises:
        ValueError: if there is none, or one is no target; at the first step, if another number of frames is decoded, or images.
    """

    def __init__(self, targets: Sequence[GuidanceTarget]):
        _check_targets(targets)
        self.targets = targets

    def prepare(self, network_config: PreTrainedConfig) -> None:
        for target in self.targets:
            target.prepare(network_config)

    def log_likelihood(self, output: ModelOutput) -> torch.Tensor:
        raise ValueError(
            f"Expected videos, as FrameTargets has a target for each of {len(self.targets)} frames, but got images."
        )

    def log_likelihood_of_frames(self, outputs: list[ModelOutput]) -> torch.Tensor:
        if len(outputs) != len(self.targets):
            raise ValueError(
                f"Expected FrameTargets to have a target for each of the {len(outputs)} frames that are decoded, but got "
                f"{len(self.targets)}."
            )
        each = [target.log_likelihood(output) for target, output in zip(self.targets, outputs)]
        return torch.stack(each).mean(0)


def _check_targets(targets: Sequence[Any]) -> None:
    if len(targets) == 0:
        raise ValueError("Expected `targets` to hold at least one target, but got none.")
    for target in targets:
        if not isinstance(target, GuidanceTarget):
            raise ValueError(f"Expected `targets` to be instances of GuidanceTarget, but got {target!r}.")
