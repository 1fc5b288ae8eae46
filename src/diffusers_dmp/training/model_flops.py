"""The floating-point operations of a training's steps, counted, and those that the device can do."""

import functools
import logging
from typing import TYPE_CHECKING

import torch

from .precision import PRECISIONS
from .utilisation import count_flops, measure_flops_per_second

if TYPE_CHECKING:
    from .loop import StepRandomness, TrainingParts

logger = logging.getLogger(__name__)


@functools.cache
def device_flops(device: torch.device, mixed_precision: str) -> float | None:
    """
    The operations per second that a device reaches in the precision of a training, measured once.

    Args:
        device (`torch.device`): The device of the training.
        mixed_precision (`str`): A key of `PRECISIONS`.

    Returns:
        See [`measure_flops_per_second`]; None if the device has no memory for it, as no training ends for that.
    """
    try:
        return measure_flops_per_second(device, PRECISIONS[mixed_precision])
    except RuntimeError as error:  # out of memory, which cuBLAS says in a way of its own
        logger.warning("`mfu` is not logged, as %s could not be measured: %s", device, _first_line(error))
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # large pieces, in which small tensors that stay would take up room


class ModelFlops:
    """
    Counts the operations that the model takes in a micro-batch: the forward pass and the backward pass that its trained weights need.

    One sample is counted for each shape of noise that occurs, at its first step, in eval mode: no random number is taken, and no more
    memory than a step takes. Texts are padded to the longest of a batch; their lengths count alike up to the next power of two, as
    almost every step would be counted otherwise. What gradient checkpointing computes again does not count, nor does what is beside the model (a VAE, a
    teacher, averaging, the optimiser).

    Args:
        parts ([`TrainingParts`]): What is trained. Sharded weights are not counted.
    """

    def __init__(self, parts: "TrainingParts"):
        self.parts = parts
        self._by_shape: dict[tuple, int | None] = {}

    def __call__(self, batch: dict[str, torch.Tensor], own: "StepRandomness", expert: int | None) -> int | None:
        """
        The operations of a micro-batch of b samples; None where they are not counted.

        Args:
            batch, own, expert: See [`TrainingParts.losses`].
        """
        if self.parts.structure is not None:
            return None
        columns = [tuple(_next_power_of_two(size) for size in column.shape[1:]) for column in batch.values()]
        shape = (own.noise.shape[1:], *columns)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._of_one(batch, own, expert)
        of_one = self._by_shape[shape]
        return None if of_one is None else len(own.timesteps) * of_one

    def _of_one(self, batch: dict[str, torch.Tensor], own: "StepRandomness", expert: int | None) -> int | None:
        """The operations of the first sample; None, and a line that says why, if they cannot be counted."""
        parts, model = self.parts, self.parts.plain_model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        conditions = parts.conditions({name: column[:1] for name, column in batch.items()}, own.dropout[:1])
        outputs: list[torch.Tensor] = []

        def forward() -> None:
            output = parts.denoiser(model, own.noise[:1], own.timesteps[:1], conditions, expert)
            outputs.append(output.sample.float().sum())

        def backward() -> None:
            torch.autograd.grad(outputs, trained, allow_unused=True)

        model.eval()
        try:
            return count_flops(forward) + count_flops(backward, recomputed=False)
        except RuntimeError as error:  # such as too little memory: no training ends for a figure in its log
            logger.warning("`mfu` is not logged, as the model's operations are not counted: %s", _first_line(error))
            return None
        finally:
            model.train()


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
