"""The floating-point operations of a training's steps, counted, and the share of them in what the device can do."""

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from .compilation import denoiser_of
from .precision import PRECISIONS
from .utilisation import DeviceLimits, count_flops, measure_limits

if TYPE_CHECKING:
    from .loop import StepRandomness, TrainingParts


@functools.cache
def limits_in_training(device: torch.device, mixed_precision: str) -> DeviceLimits:
    """What a device can do in the precision of a training, measured once; see [`measure_limits`]."""
    return measure_limits(device, PRECISIONS[mixed_precision])


class ModelFlops:
    """
    Counts the operations that the model takes in a micro-batch: the forward pass and the backward pass that its trained weights need.

    One sample is counted for each shape that occurs, at its first step, in eval mode: no random number is taken, and no more memory
    than a step takes. What gradient checkpointing computes again does not count, nor does what is beside the model (a VAE, a
    teacher, averaging, the optimiser).

    Args:
        parts ([`TrainingParts`]): What is trained. Sharded weights are not counted.
    """

    def __init__(self, parts: "TrainingParts"):
        self.parts = parts
        self._by_shape: dict[tuple, int] = {}

    def __call__(self, batch: dict[str, torch.Tensor], own: "StepRandomness", expert: int | None) -> int | None:
        """
        The operations of a micro-batch of b samples; None where they are not counted.

        Args:
            batch, own, expert: See [`TrainingParts.losses`].
        """
        if self.parts.structure is not None:
            return None
        shape = tuple((name, column.shape[1:]) for name, column in batch.items())
        if shape not in self._by_shape:
            self._by_shape[shape] = self._of_one(batch, own, expert)
        return len(own.timesteps) * self._by_shape[shape]

    def _of_one(self, batch: dict[str, torch.Tensor], own: "StepRandomness", expert: int | None) -> int:
        """The operations of the first sample."""
        parts, model = self.parts, self.parts.plain_model
        checkpointed = [
            each for each in denoiser_of(model).modules() if getattr(each, "gradient_checkpointing", False)
        ]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        one = {name: column[:1] for name, column in batch.items()}
        conditions = parts.conditions(one, own.dropout[:1])

        def forward_and_backward() -> None:
            output = parts.denoiser(model, own.noise[:1], own.timesteps[:1], conditions, expert)
            torch.autograd.grad(output.sample.float().sum(), trained, allow_unused=True)

        _set_checkpointing(checkpointed, False)
        model.eval()
        try:
            return count_flops(forward_and_backward)
        finally:
            model.train()
            _set_checkpointing(checkpointed, True)


def _set_checkpointing(modules: list[nn.Module], enabled: bool) -> None:
    for module in modules:
        module.gradient_checkpointing = enabled  # type: ignore[assignment]
