"""Images, or latents of them, in: from a folder, from parquet, or from the Hub, through `datasets`.

Legend: B batch size of one optimiser step over all processes, N images, C channels, S image size in pixels.
"""

import functools
import io
import itertools
import os
from collections.abc import Iterator

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import safetensors.torch
import torch
from torch.utils.data import DataLoader, Sampler

from ..arguments import DataArguments

LATENTS = "latents"  # the column of what `encode_latents` wrote
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def load_images(source: str, image_column: str = "image", split: str = "train") -> datasets.Dataset:
    """
    A data set of images, or of latents from `encode_latents`, and of class labels if it has a label column.

    Args:
        source (`str`): A folder of images (one sub-folder per class, or no sub-folders), a folder of parquet files, one
            parquet file, or the id of a data set on the Hub.
        image_column (`str`): Where the images are.
        split (`str`): Which part of it.

    Raises:
        ValueError: if `source` is a folder without images, or has no such column.
    """
    if not source:
        raise ValueError("Expected `dataset` to be a folder, a parquet file or a Hub data set id, but got nothing.")
    try:
        if os.path.isfile(source):
            dataset = datasets.load_dataset("parquet", data_files=source, split=split)
        else:
            dataset = datasets.load_dataset(source, split=split)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"Expected `dataset` to be a folder with images, parquet, or a data set on the Hub, but got {source!r}: "
            f"{error}"
        ) from error
    if LATENTS in dataset.column_names:
        return dataset
    if image_column not in dataset.column_names:
        raise ValueError(
            f"Expected `image_column` to be one of {dataset.column_names}, the columns of {source!r}, "
            f"but got {image_column!r}."
        )
    # decoded by ourselves, so that a broken file can be named
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) or name == image_column:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def class_names(dataset: datasets.Dataset, label_column: str = "label") -> list[str] | None:
    """
    The names of the classes, by index; None for a data set without labels.

    Raises:
        ValueError: if the labels are neither classes nor integers.
    """
    if label_column not in dataset.column_names:
        return None
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if not pa.types.is_integer(feature.pa_type):
        raise ValueError(
            f"Expected `label_column` {label_column!r} to hold class indices, but got {feature.dtype}; "
            f"`dataset.class_encode_column({label_column!r})` makes indices of names."
        )
    return [str(label) for label in range(max(dataset[label_column]) + 1)]


def training_items(dataset: datasets.Dataset, args: DataArguments) -> datasets.Dataset:
    """[`to_tensors`] as the arguments have it."""
    return to_tensors(
        dataset,
        args.image_size,
        args.image_channels,
        args.image_column,
        args.label_column,
        args.teacher_image_column,
        args.teacher_image_size,
    )


def to_tensors(
    dataset: datasets.Dataset,
    image_size: int,
    channels: int,
    image_column: str = "image",
    label_column: str = "label",
    teacher_image_column: str | None = None,
    teacher_image_size: int | None = None,
) -> datasets.Dataset:
    """
    The same data set, whose items are `images` (C, S, S) in [-1, 1] and, with labels, `class_labels` ().

    The items of a data set of latents are `mean` and `std` instead, both (2, C, S, S): of image and mirror image.

    Args:
        image_size (`int`): S.
        channels (`int`): C: 1, 3 or 4.
        teacher_image_column (`str`), teacher_image_size (`int`, *optional*): A second image of each item, `teacher_images`.

    Raises:
        ValueError: on reading an item that is not an image; the file is named.
    """
    if channels not in PIL_MODES:
        raise ValueError(f"Expected the number of channels to be one of {list(PIL_MODES)}, but got {channels}.")

    return dataset.with_transform(
        functools.partial(
            _read_items,
            image_size=image_size,
            channels=channels,
            image_column=image_column,
            label_column=label_column,
            teacher_image_column=teacher_image_column,
            teacher_image_size=teacher_image_size,
        )
    )


def _read_items(
    columns: dict[str, list],
    image_size: int,
    channels: int,
    image_column: str,
    label_column: str,
    teacher_image_column: str | None,
    teacher_image_size: int | None,
) -> dict[str, list]:
    if LATENTS in columns:
        latents = [safetensors.torch.load(encoded) for encoded in columns[LATENTS]]
        items = {name: [moments[name].float() for moments in latents] for name in ("mean", "std")}
    else:
        items = {"images": _read_images(columns[image_column], image_size, channels)}
    if teacher_image_column is not None:
        items["teacher_images"] = _read_images(columns[teacher_image_column], teacher_image_size, channels)
    if label_column in columns:
        items["class_labels"] = columns[label_column]
    return items


def _read_images(column: list[dict], image_size: int, channels: int) -> list[torch.Tensor]:
    images = (open_image(encoded).convert(PIL_MODES[channels]) for encoded in column)
    return [to_tensor(center_crop(image, image_size)) for image in images]


def open_image(encoded: dict) -> PIL.Image.Image:
    """Decode one entry of an undecoded `datasets.Image` column."""
    file = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    try:
        image = PIL.Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
        where = encoded["path"] or f"{len(encoded['bytes'])} bytes without a name"
        raise ValueError(f"Expected `dataset` to hold readable images, but got {where}: {error}") from error
    return image


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    ADM's centre crop (https://arxiv.org/abs/2105.05233): halved by box filter while it is twice too large, then scaled
    bicubically so that the shorter side is `size`, then cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        shape = (round(image.width * scale), round(image.height * scale))
        image = image.resize(shape, PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """8-bit image → (C, H, W) in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32))  # (H, W, C)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


class GlobalBatchSampler(Sampler[list[int]]):
    """
    Endless batches, decided by (seed, step) alone: this process's slices of batches of B that are the same whatever the
    number of processes and of accumulation steps, and in which each image occurs exactly once per epoch.

    The epochs' permutations follow one another without a gap, so that a batch may begin in one and end in the next.
    Accelerate's own sharding pads or drops the last batch of an epoch instead.

    Args:
        num_images (`int`): N.
        batch_size (`int`): B.
        seed (`int`): Of the order.
        num_slices (`int`): Into how many micro-batches B is cut: processes times accumulation steps.
        own_slices (`range`): Which of them are this process's.
        first_step (`int`): Where to begin, for a resumed training.
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
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
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
) -> Iterator[dict]:
    """The sampler's batches as dictionaries of stacked tensors."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # its base seed, which nothing here depends on, would otherwise be drawn from the global random state
        generator=torch.Generator().manual_seed(0),
    )
    return iter(loader)
