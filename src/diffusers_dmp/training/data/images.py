"""Images, or latents of them, from a folder, from parquet files or from the Hub, through `datasets`.

Legend: N images, C channels, S image size in pixels.
"""

import io
import os
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import safetensors.torch
import torch

from ..arguments import DataArguments
from .shards import expect_whole_shards

LATENTS = "latents"  # the column that `encode_latents` writes
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def load_images(source: str, image_column: str = "image", split: str = "train") -> datasets.Dataset:
    """
    Load a data set of images, or of latents from [`encode_latents`], with class labels if it has a label column.

    Args:
        source (`str`): A folder of images (one sub-folder per class, or no sub-folders), a folder of parquet files, one
            parquet file, or the id of a data set on the Hub.
        image_column (`str`): The column of images.
        split (`str`): The split to load.

    Returns:
        `datasets.Dataset`: Its images are not decoded yet; see [`to_tensors`].

    Raises:
        ValueError: if `source` is a folder without images, or has no such column.
    """
    if not source:
        raise ValueError("Expected `dataset` to be a folder, a parquet file or a Hub data set id, but got nothing.")
    expect_whole_shards(source)
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
    # not decoded by `datasets`, so that an error can name the broken file
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) or name == image_column:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def class_names(dataset: datasets.Dataset, label_column: str = "label") -> list[str] | None:
    """
    The names of the classes, ordered by class index.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        label_column (`str`): The column of class labels.

    Returns:
        `list[str]`: The names; the indices themselves where the labels are plain integers; None for a data set without
        labels.

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


def describe_images(dataset: datasets.Dataset, label_column: str = "label") -> str:
    """
    Say in words what a data set holds: '9 images, 3 classes: bus 3, car 3, train 3', or '8 images, unconditional'.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        label_column (`str`): The column of class labels.
    """
    names = class_names(dataset, label_column)
    if names is None:
        return f"{len(dataset)} images, unconditional"
    counts = np.bincount(dataset[label_column], minlength=len(names))
    classes = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    return f"{len(dataset)} images, {len(names)} classes: {classes}"


@dataclass(frozen=True)
class ImageReader:
    """
    Turns rows of a data set into tensors.

    The items are `images` (C, S, S) in [-1, 1] and, with labels, `class_labels` (). For a data set of latents they are
    `mean` and `std` instead of `images`, both of shape (2, c, s, s): of the image, and of its mirror image.

    Args:
        image_size (`int`): S, in pixels.
        channels (`int`): C: 1, 3 or 4.
        image_column (`str`), label_column (`str`): The columns to read.
        teacher_image_column (`str`, *optional*): The column of a second image of each item, `teacher_images`.
        teacher_image_size (`int`, *optional*): The size of that image in pixels.

    Raises:
        ValueError: if `channels` has another value; and, on reading, if an item is not an image (the file is named).
    """

    image_size: int
    channels: int
    image_column: str = "image"
    label_column: str = "label"
    teacher_image_column: str | None = None
    teacher_image_size: int | None = None

    def __post_init__(self):
        if self.channels not in PIL_MODES:
            raise ValueError(
                f"Expected the number of channels to be one of {list(PIL_MODES)}, but got {self.channels}."
            )

    def __call__(self, columns: dict[str, list]) -> dict[str, list]:
        """Rows, as `datasets` hands them to a transform (one list per column) → the items' tensors, in the same layout."""
        items: dict[str, list]
        if LATENTS in columns:
            latents = [safetensors.torch.load(encoded) for encoded in columns[LATENTS]]
            items = {name: [moments[name].float() for moments in latents] for name in ("mean", "std")}
        else:
            items = {"images": self._read(columns[self.image_column], self.image_size)}
        if self.teacher_image_column is not None and self.teacher_image_size is not None:
            items["teacher_images"] = self._read(columns[self.teacher_image_column], self.teacher_image_size)
        if self.label_column in columns:
            items["class_labels"] = columns[self.label_column]
        return items

    def _read(self, column: list[dict[str, Any]], size: int) -> list[torch.Tensor]:
        images = (open_image(encoded).convert(PIL_MODES[self.channels]) for encoded in column)
        return [to_tensor(center_crop(image, size)) for image in images]


def to_tensors(dataset: datasets.Dataset, image_size: int, channels: int, **columns: Any) -> datasets.Dataset:
    """
    The same data set with tensors as items.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        image_size (`int`), channels (`int`), columns: See [`ImageReader`].
    """
    return dataset.with_transform(ImageReader(image_size, channels, **columns))


def training_items(dataset: datasets.Dataset, args: DataArguments) -> datasets.Dataset:
    """The same data set with tensors as items, of the size and from the columns that the arguments name."""
    return to_tensors(
        dataset,
        args.image_size,
        args.image_channels,
        image_column=args.image_column,
        label_column=args.label_column,
        teacher_image_column=args.teacher_image_column,
        teacher_image_size=args.teacher_image_size,
    )


def open_image(encoded: dict[str, Any]) -> PIL.Image.Image:
    """
    Decode one entry of a `datasets.Image` column that was loaded with `decode=False`.

    Args:
        encoded (`dict`): `bytes` of an image file, or None, and its `path`.

    Raises:
        ValueError: if it is not an image that can be read; the file is named.
    """
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
    Crop the centre square of an image and scale it to `size` x `size` pixels, as ADM does (https://arxiv.org/abs/2105.05233).

    The image is halved with a box filter while it is at least twice too large, then scaled bicubically until its shorter
    side has `size` pixels, then cropped.
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
    """8-bit image → float32 tensor (C, H, W) in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image, dtype=np.float32))  # (H, W, C)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()
