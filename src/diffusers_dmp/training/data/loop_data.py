"""What the training loop needs of any data: batches, held-out batches, and what identifies and describes both.

Legend: B batch size of one optimiser step over all processes, b that of one micro-batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from ..arguments import LoopArguments

Batch = dict[str, torch.Tensor]


class LoopData(ABC):
    """
    What a training runs on; a subclass knows one kind of data.

    All samples of an optimiser step have one shape, in every process.
    """

    sample_shape: tuple[int, ...] = ()  # of one sample, where all have the same
    vae: AutoencoderKL | None = None  # frozen, to train on its latents where the data are images

    @abstractmethod
    def num_samples(self, args: LoopArguments) -> int:
        """The number of samples in an epoch."""

    @abstractmethod
    def training_batches(self, accelerator: Accelerator, args: LoopArguments, first_step: int) -> Iterator[Batch]:
        """This process's micro-batches, from `first_step` on, in an order that (seed, step) alone decides."""

    @abstractmethod
    def num_validation_samples(self, args: LoopArguments) -> int:
        """The number of held-out samples, each counted `args.validation_repeats` times; 0 without any."""

    @abstractmethod
    def validation_batches(self, accelerator: Accelerator, args: LoopArguments) -> Iterator[tuple[list[int], Batch]]:
        """This process's share of the held-out samples: the indices (b,) of some of them, and their batch."""

    @abstractmethod
    def identity(self, args: LoopArguments) -> dict[str, Any]:
        """What identifies the data wherever they lie, as JSON can hold it: a resumed run has to have the same."""

    @abstractmethod
    def validation_identity(self, args: LoopArguments) -> dict[str, Any]:
        """What a validation loss depends on, besides the weights and what may not change; empty without validation."""

    @abstractmethod
    def describe(self) -> str:
        """The data in a few words."""

    @abstractmethod
    def describe_validation(self) -> str:
        """The held-out data in a few words."""
