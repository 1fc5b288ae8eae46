"""Batches of a data set in an order that (seed, step) alone decides, for any number of processes.

Legend: B batch size of one optimiser step over all processes, N images.
"""

import functools
import itertools
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from ..arguments import SharedTrainingArguments
from ..interruption import ignore_signals
from .images import training_items


class GlobalBatchSampler(Sampler[list[int]]):
    """
    This process's slices of endless batches that (seed, step) alone decides.

    The batches of B images are the same for any number of processes and accumulation steps, and each image occurs exactly
    once per epoch: the epochs' permutations follow one another without a gap, so that a batch may begin in one and end in
    the next. Accelerate's own sharding pads or drops the last batch of an epoch instead.

    Args:
        num_images (`int`): N.
        batch_size (`int`): B.
        seed (`int`): Decides the order, together with the step.
        num_slices (`int`): The number of micro-batches that B is cut into: processes times accumulation steps.
        own_slices (`range`): The micro-batches of this process.
        first_step (`int`): The step to begin with; not 0 when a training is resumed.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, num_slices: int, own_slices: range, first_step: int = 0
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.num_slices = num_slices
        self.own_slices = own_slices
        self.first_step = first_step
        self._permutation = functools.lru_cache(maxsize=2)(self._compute_permutation)

    def _compute_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_images)

    def batch(self, step: int) -> list[int]:
        """The indices of all B images of an optimiser step."""
        positions = (
            divmod(position, self.num_images)
            for position in range(step * self.batch_size, (step + 1) * self.batch_size)
        )
        return [int(self._permutation(epoch)[position]) for epoch, position in positions]

    def __iter__(self) -> Iterator[list[int]]:
        length = self.batch_size // self.num_slices
        for step in itertools.count(self.first_step):
            batch = self.batch(step)
            for own in self.own_slices:
                yield batch[own * length : (own + 1) * length]


def endless_batches(
    dataset: datasets.Dataset, sampler: GlobalBatchSampler, num_workers: int, pin_memory: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The sampler's batches as dictionaries of stacked tensors.

    Args:
        dataset (`datasets.Dataset`): With tensors as items; see [`to_tensors`].
        sampler ([`GlobalBatchSampler`]): Decides which items a batch has.
        num_workers (`int`): Processes that read ahead; 0 for none.
        pin_memory (`bool`): Whether batches lie in pinned memory, from which copies to a GPU need not be waited for.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
        # nothing here depends on the loader's base seed, but without a generator it would change the global random state
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


def training_batches(
    accelerator: Accelerator, args: SharedTrainingArguments, dataset: datasets.Dataset, first_step: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches of a training, from `first_step` on."""
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    first_slice = accelerator.process_index * args.gradient_accumulation_steps
    own_slices = range(first_slice, first_slice + args.gradient_accumulation_steps)
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, args.seed, num_slices, own_slices, first_step)
    items = training_items(dataset, args)
    return endless_batches(items, sampler, args.dataloader_num_workers, accelerator.device.type == "cuda")
