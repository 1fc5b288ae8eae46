"""Batches of a data set in an order that (seed, step) alone decides, for any number of processes.

Legend: B batch size of one optimiser step over all processes, N images.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler

from ..arguments import LoopArguments, SharedTrainingArguments
from ..interruption import ignore_signals
from .images import class_names, training_items
from .workers import choose_workers, num_bytes_of


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

    def image(self, position: int) -> int:
        """The index of the image at a position of the endless sequence that batches are cut from."""
        epoch, index = divmod(position, self.num_images)
        return int(self._permutation(epoch)[index])

    def batch(self, step: int) -> list[int]:
        """The indices of all B images of an optimiser step."""
        return [self.image(position) for position in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        length = self.batch_size // self.num_slices
        for step in itertools.count(self.first_step):
            batch = self.batch(step)
            for own in self.own_slices:
                yield batch[own * length : (own + 1) * length]


class BalancedBatchSampler(GlobalBatchSampler):
    """
    Batches in which all classes are equally frequent, however many images each has.

    The sequence of images consists of rounds. A round has one image of each class that has any, in random order; a class's
    images follow one another in permutations, so that none comes twice before all have come once.

    Args:
        labels (`np.ndarray` of shape (N,)): The class of each image.
        batch_size, seed, num_slices, own_slices, first_step: See [`GlobalBatchSampler`].
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, seed: int, num_slices: int, own_slices: range, first_step: int = 0
    ):
        super().__init__(len(labels), batch_size, seed, num_slices, own_slices, first_step)
        by_class = np.argsort(labels, kind="stable")
        self.images_by_class = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
        self._round = functools.lru_cache(maxsize=2)(self._compute_round)
        self._class_permutation = functools.lru_cache(maxsize=2 * self.num_classes)(self._compute_class_permutation)

    @property
    def num_classes(self) -> int:
        """The number of classes that have images."""
        return len(self.images_by_class)

    def _compute_round(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, number]).permutation(self.num_classes)

    def _compute_class_permutation(self, own_class: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 1 + own_class, epoch]).permutation(self.images_by_class[own_class])

    def image(self, position: int) -> int:
        """The index of the image at a position: the n-th round has the n-th image of each class's own sequence."""
        number, place = divmod(position, self.num_classes)
        own_class = int(self._round(number)[place])
        epoch, index = divmod(number, len(self.images_by_class[own_class]))
        return int(self._class_permutation(own_class, epoch)[index])


def with_repeats(dataset: datasets.Dataset, args: SharedTrainingArguments) -> datasets.Dataset:
    """
    The rows of an epoch: each image as often as `args.class_repeats` says for its class.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        args ([`SharedTrainingArguments`]): For the repeats and the label column.

    Raises:
        ValueError: if `class_repeats` or `balance_classes` is set for a data set without classes, or names one that it has not.
    """
    names = class_names(dataset, args.label_column)
    if names is None and (args.class_repeats or args.balance_classes):
        name = "class_repeats" if args.class_repeats else "balance_classes"
        raise ValueError(
            f"Expected `{name}` to be used with classes only, but {args.dataset!r} has no column {args.label_column!r}."
        )
    repeats = args.repeats_by_class()
    if names is None or not repeats:
        return dataset
    unknown = repeats.keys() - set(names)
    if unknown:
        raise ValueError(
            f"Expected `class_repeats` to name classes of {', '.join(names)}, but got {', '.join(sorted(unknown))}."
        )
    by_class = np.array([repeats.get(name, 1) for name in names])
    return dataset.select(np.repeat(np.arange(len(dataset)), by_class[labels_of(dataset, args)]))


def labels_of(dataset: datasets.Dataset, args: SharedTrainingArguments) -> np.ndarray:
    """The class of each image, (N,)."""
    return np.asarray(dataset[args.label_column][:])


def endless_batches(
    dataset: datasets.Dataset,
    sampler: GlobalBatchSampler,
    num_workers: int | None,
    device: torch.device,
    collate: Callable[[list], dict[str, torch.Tensor]] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The sampler's batches as dictionaries of stacked tensors.

    Args:
        dataset (`datasets.Dataset`): With tensors as items; see [`to_tensors`].
        sampler ([`GlobalBatchSampler`]): Decides which items a batch has.
        num_workers (`int`, *optional*): Processes that read ahead; see [`choose_workers`].
        device (`torch.device`): What they are for; copies to a GPU need not be waited for, as they come from pinned memory.
        collate (`Callable`, *optional*): Makes a batch of a list of items; by default their tensors are stacked.
    """
    micro_batch_size = sampler.batch_size // sampler.num_slices
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=choose_workers(num_workers, device, micro_batch_size * num_bytes_of(dataset[0])),
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        # nothing here depends on the loader's base seed, but without a generator it would change the global random state
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)


def slices_of_process(accelerator: Accelerator, args: LoopArguments) -> tuple[int, range]:
    """The number of micro-batches that a batch is cut into, over all processes, and which of them this process has."""
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    first_slice = accelerator.process_index * args.gradient_accumulation_steps
    return num_slices, range(first_slice, first_slice + args.gradient_accumulation_steps)


def training_batches(
    accelerator: Accelerator, args: SharedTrainingArguments, dataset: datasets.Dataset, first_step: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's micro-batches of a training, from `first_step` on."""
    dataset = with_repeats(dataset, args)
    order = (args.batch_size, args.seed, *slices_of_process(accelerator, args), first_step)
    sampler = (
        BalancedBatchSampler(labels_of(dataset, args), *order)
        if args.balance_classes
        else GlobalBatchSampler(len(dataset), *order)
    )
    items = training_items(dataset, args)
    return endless_batches(items, sampler, args.dataloader_num_workers, accelerator.device)
