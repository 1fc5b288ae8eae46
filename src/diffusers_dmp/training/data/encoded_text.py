"""Encoded images and captions as the data of a training: latents, prompts, and the empty prompt.

Legend: N images, B batch size of one optimiser step over all processes, b that of one micro-batch.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from ..arguments import LoopArguments
from ..interruption import ignore_signals
from .batches import endless_batches, slices_of_process
from .bucket_batches import BucketBatchSampler
from .encoded_rows import Columns, collate
from .encoded_source import Encoded, check_encodings_agree, check_mirror_images, check_shapes, load_encoded
from .encoding_record import check_encoding
from .listing import shorten
from .loop_data import Batch, LoopData
from .workers import choose_workers, num_bytes_of

VALIDATION_BATCH_SIZE = 32

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EncodedText(LoopData):
    """
    Encoded images and captions to train on.

    Args:
        training ([`Encoded`]): The training data.
        validation ([`Encoded`], *optional*): Held-out data of the same encoding.
    """

    training: Encoded
    validation: Encoded | None = None

    @property
    def empty_prompt(self) -> Columns:
        """The columns of the empty prompt, each of shape (1, …), for [`TextConditions`]."""
        return self.training.empty_prompt

    def num_samples(self, args: LoopArguments) -> int:
        """See [`LoopData`]."""
        return len(self.training)

    def training_batches(self, accelerator: Accelerator, args: LoopArguments, first_step: int) -> Iterator[Batch]:
        """Micro-batches of `mean` and `std` (b, M, C, …) and the prompt's columns; see [`LoopData`], [`BucketBatchSampler`]."""
        order = (args.batch_size, args.seed, *slices_of_process(accelerator, args), first_step)
        sampler = BucketBatchSampler(self.training.buckets, *order)
        num_workers, device = args.dataloader_num_workers, accelerator.device
        return endless_batches(self.training.samples, sampler, num_workers, device, collate)

    def num_validation_samples(self, args: LoopArguments) -> int:
        """See [`LoopData`]."""
        return 0 if self.validation is None else len(self.validation) * args.validation_repeats

    def validation_batches(self, accelerator: Accelerator, args: LoopArguments) -> Iterator[tuple[list[int], Batch]]:
        """See [`LoopData`]; the n-th repeat of sample i has the index i + n·N."""
        assert self.validation is not None  # there are no validation samples without
        own = range(accelerator.process_index, self.num_validation_samples(args), accelerator.num_processes)
        batches = batches_of_one_bucket(own, self.validation.buckets, VALIDATION_BATCH_SIZE)
        samples = self.validation.samples
        batch_bytes = VALIDATION_BATCH_SIZE * num_bytes_of(samples[0])
        loader: DataLoader[Batch] = DataLoader(
            samples,
            batch_sampler=[[index % len(self.validation) for index in batch] for batch in batches],
            num_workers=choose_workers(args.dataloader_num_workers, accelerator.device, batch_bytes),
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # without one, the loader would change the global random state
        )
        yield from zip(batches, loader)

    def identity(self, args: LoopArguments) -> dict[str, Any]:
        """See [`LoopData`]."""
        return self.training.identity()

    def validation_identity(self, args: LoopArguments) -> dict[str, Any]:
        """See [`LoopData`]."""
        if self.validation is None:
            return {}
        return {**self.validation.identity(), "split": args.validation_split, "repeats": args.validation_repeats}

    def describe(self) -> str:
        """See [`LoopData`]."""
        return self.training.describe()

    def describe_validation(self) -> str:
        """See [`LoopData`]."""
        return "none" if self.validation is None else self.validation.describe()

    def check_pipeline(self, pipeline: Any, source: str | None = None) -> None:
        """
        Check that a pipeline is the one that encoded the data, and that its denoiser takes them.

        Args:
            pipeline ([`DiffusionPipeline`]): The pipeline to train, with or without its text encoders and VAE.
            source (`str`, *optional*): The folder that it is from, to compare what is not loaded; see [`check_encoding`].

        Raises:
            ValueError: if it is not, or does not; what differs is named.
        """
        check_encoding(self.training.encoding, pipeline, source, self.training.source)
        check_shapes(self.training, pipeline)


def load_encoded_text(accelerator: Accelerator, args: LoopArguments) -> EncodedText:
    """
    Load encoded images and captions for a training, and set the seed of all global random states.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`LoopArguments`]): Names the data sets.

    Raises:
        ValueError: if a data set is not whole or not what `encode_prompts.py` wrote, lacks the mirror images that `random_flip` needs,
            or if the held-out data have another encoding.
    """
    set_seed(args.seed)  # for new weights, and the model's own dropout
    validation = None
    with accelerator.main_process_first():  # the other processes then read its cache
        training = load_encoded(args.dataset, args.dataset_split)
        if args.validation_dataset is not None:
            validation = load_encoded(args.validation_dataset, args.validation_split)
    check_mirror_images(training.encoding, args)
    if validation is not None:
        check_encodings_agree(training, validation)
    counts = np.bincount(training.buckets)
    small = [
        f"{height} x {width} ({count})"
        for (height, width), count in zip(training.sizes, counts)
        if count < args.batch_size
    ]
    if small and accelerator.is_main_process:
        logger.warning(
            "Of some sizes there are fewer images than `batch_size`, %d, so that a batch of them has images several times: %s.",
            args.batch_size,
            shorten(small),
        )
    return EncodedText(training=training, validation=validation)


def batches_of_one_bucket(indices: range, buckets: np.ndarray, batch_size: int) -> list[list[int]]:
    """
    Cut indices into batches of at most `batch_size`, each of one bucket.

    Args:
        indices (`range`): Of samples; the index i is of row i modulo N.
        buckets (`np.ndarray` of shape (N,)): The bucket of each row.
        batch_size (`int`): The most that a batch has.
    """
    own = np.asarray(indices, np.int64)
    own_buckets = buckets[own % len(buckets)]
    groups = [own[own_buckets == bucket].tolist() for bucket in np.unique(own_buckets)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
