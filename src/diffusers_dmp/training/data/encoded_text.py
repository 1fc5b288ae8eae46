"""Encoded images and captions as the data of a training: latents, prompts, and the empty prompt.

Legend: N images, B batch size of one optimiser step over all processes, b that of one micro-batch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from torch.utils.data import DataLoader

from ...saving.reading import read_json
from ...saving.weight_files import read_safetensors
from ..arguments import LoopArguments
from ..interruption import ignore_signals
from ..text_pipelines import text_pipeline_of
from .batches import endless_batches, slices_of_process
from .bucket_batches import BucketBatchSampler
from .encoded_rows import CAPTION, HEIGHT, PROMPT, WIDTH, Columns, collate, read_rows
from .encoding_record import COMPONENTS, EMPTY_PROMPT_NAME, ENCODING_NAME, check_components, check_encoding
from .identity import digest
from .images import LATENTS
from .listing import shorten
from .loop_data import Batch, LoopData
from .sources import open_source

VALIDATION_BATCH_SIZE = 32

# entries of a denoiser's configuration that are the width of the prompt's tokens, in the order in which they decide
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "text_dim", "cap_feat_dim", "cross_attention_dim")


@dataclass(kw_only=True)
class Encoded:
    """
    Encoded images and captions, as `encode_prompts.py` wrote them.

    Args:
        source (`str`): The folder or Hub id that they are from.
        rows (`datasets.Dataset`): With the columns of `encoded_rows.py`.
        encoding (`dict[str, Any]`): The record of what encoded them.
        empty_prompt (`dict[str, torch.Tensor]`): The columns of the empty prompt, each of shape (1, …).
    """

    source: str
    rows: datasets.Dataset
    encoding: dict[str, Any]
    empty_prompt: Columns
    buckets: np.ndarray = field(init=False)  # (N,), the number of each row's size
    sizes: list[tuple[int, int]] = field(init=False)  # heights and widths, by that number

    def __post_init__(self):
        pairs = np.stack([np.asarray(self.rows[name][:], np.int64) for name in (HEIGHT, WIDTH)], axis=1)
        sizes, buckets = np.unique(pairs, axis=0, return_inverse=True)
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self.buckets = buckets.reshape(-1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def samples(self) -> datasets.Dataset:
        """The same rows with tensors as items; see [`read_rows`]."""
        return self.rows.select_columns([LATENTS, PROMPT]).with_transform(read_rows)

    def identity(self) -> dict[str, Any]:
        """What identifies them, wherever they lie."""
        components = self.encoding[COMPONENTS]
        return {
            "images": len(self),
            "captions": digest(self.rows[CAPTION]),
            "sizes": [f"{height} x {width}" for height, width in self.sizes],
            "dtype": self.encoding["dtype"],
            "pipeline": self.encoding["pipeline_class"],
            "encoders": {name: record.get("weights") for name, record in components.items() if "weights" in record},
        }

    def describe(self) -> str:
        """What they are in a few words."""
        counts = np.bincount(self.buckets)
        sizes = [f"{height} x {width} ({count})" for (height, width), count in zip(self.sizes, counts)]
        mirrored = ", with mirror images" if self.encoding["mirror"] else ""
        return f"{len(self)} images with captions{mirrored}, encoded for {self.encoding['pipeline_class']}: {shorten(sizes)}"


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
        pin_memory = accelerator.device.type == "cuda"
        return endless_batches(self.training.samples, sampler, args.dataloader_num_workers, pin_memory, collate)

    def num_validation_samples(self, args: LoopArguments) -> int:
        """See [`LoopData`]."""
        return 0 if self.validation is None else len(self.validation) * args.validation_repeats

    def validation_batches(self, accelerator: Accelerator, args: LoopArguments) -> Iterator[tuple[list[int], Batch]]:
        """See [`LoopData`]; the n-th repeat of sample i has the index i + n·N."""
        assert self.validation is not None  # there are no validation samples without
        own = range(accelerator.process_index, self.num_validation_samples(args), accelerator.num_processes)
        batches = batches_of_one_bucket(own, self.validation.buckets, VALIDATION_BATCH_SIZE)
        loader: DataLoader[Batch] = DataLoader(
            self.validation.samples,
            batch_sampler=[[index % len(self.validation) for index in batch] for batch in batches],
            num_workers=args.dataloader_num_workers,
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
    if args.random_flip and not training.encoding["mirror"]:
        raise ValueError(
            f"Expected `random_flip` to be false for {args.dataset!r}, which was encoded without mirror images, but got true; "
            "encode_prompts.py writes them with `--mirror true`."
        )
    if validation is not None:
        check_encodings_agree(training, validation)
    return EncodedText(training=training, validation=validation)


def load_encoded(source: str, split: str = "train") -> Encoded:
    """
    Load what `encode_prompts.py` wrote.

    Args:
        source (`str`): Its folder, or the id of a data set on the Hub.
        split (`str`): The split to load.

    Raises:
        ValueError: if it is something else, or not whole.
    """
    if not source:
        raise ValueError("Expected `dataset` to be a folder that encode_prompts.py wrote, or a Hub id, but got nothing.")
    source = os.path.expanduser(source)
    encoding = read_json(_file_beside(source, ENCODING_NAME))
    if COMPONENTS not in encoding:
        raise ValueError(
            f"Expected {source!r} to be encoded by encode_prompts.py, with captions, but its {ENCODING_NAME} is of latents alone."
        )
    rows = open_source(source, split)
    if len(rows) != encoding["num_images"] and split == "train":
        raise ValueError(
            f"Expected {source!r} to hold the {encoding['num_images']} images of its {ENCODING_NAME}, but got {len(rows)}; run "
            "encode_prompts.py again, which goes on with the missing shards."
        )
    return Encoded(
        source=source, rows=rows, encoding=encoding, empty_prompt=read_safetensors(_file_beside(source, EMPTY_PROMPT_NAME))
    )


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


def check_encodings_agree(training: Encoded, validation: Encoded) -> None:
    """
    Check that held-out data have the encoding of the training data.

    Raises:
        ValueError: if not; what differs is named.
    """
    for name in ("pipeline_class", "dtype"):
        wanted, got = (each.encoding[name] for each in (training, validation))
        if wanted != got:
            raise ValueError(
                f"Expected `validation_dataset` to have the {name} of `dataset`, {wanted}, but got {got} in {validation.source!r}."
            )
    check_components(training.encoding[COMPONENTS], validation.encoding[COMPONENTS], validation.source)


def check_shapes(encoded: Encoded, pipeline: Any) -> None:
    """
    Check that a pipeline's denoiser takes latents and prompts of these widths.

    Raises:
        ValueError: if not.
    """
    text_pipeline = text_pipeline_of(pipeline)
    config = getattr(pipeline, text_pipeline.component).config
    sample = encoded.samples[0]
    channels = sample["mean"].shape[1]
    taken = config.get("in_channels")
    if taken is not None and taken not in (channels, channels * text_pipeline.packed_size**2):
        raise ValueError(
            f"Expected the latents in {encoded.source!r} to have the channels that this pipeline's denoiser takes, {taken}, but got "
            f"{channels}."
        )
    width = next((config[name] for name in TEXT_WIDTHS if config.get(name)), None)
    embeds = sample.get("prompt_embeds")
    if isinstance(width, int) and embeds is not None and embeds.shape[-1] != width:
        raise ValueError(
            f"Expected the prompts in {encoded.source!r} to be {width} wide, as this pipeline's denoiser takes them, but got "
            f"{embeds.shape[-1]}."
        )


def _file_beside(source: str, name: str) -> Path:
    """A file beside shards, in a folder or on the Hub."""
    path = Path(source, name)
    if os.path.isdir(source) and path.is_file():
        return path
    if not os.path.exists(source):
        try:
            return Path(hf_hub_download(source, name, repo_type="dataset"))
        except (EntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
            raise ValueError(
                f"Expected {source!r} to be a folder that encode_prompts.py wrote, or such a data set on the Hub, but got: {error}"
            ) from error
    raise ValueError(f"Expected {source!r} to be a folder that encode_prompts.py wrote, but it has no {name}.")
