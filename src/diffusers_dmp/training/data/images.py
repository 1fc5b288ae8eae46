"""Images, or latents of them, from a folder, from parquet files or from the Hub.

Legend: N images, C channels, S image size in pixels.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import safetensors.torch
import torch

from ..arguments import DataArguments
from .decoding import BACKGROUND, PIL_MODES, open_image
from .fitting import center_crop as center_crop  # its former place
from .fitting import fit_square, to_tensor
from .folders import is_image_folder
from .labels import NO_LABELS, check_labels, class_counts, class_names, wants_labels
from .listing import shorten
from .scan import readable_images
from .sources import open_source

LATENTS = "latents"  # the column that `encode_latents` writes
MAX_CLASSES_SAID = 10


def load_images(
    source: str,
    image_column: str = "image",
    split: str = "train",
    label_column: str | None = "label",
    text_column: str | None = None,
) -> datasets.Dataset:
    """
    Load a data set of images, or of latents from [`encode_latents`], with class labels if it has a label column.

    Args:
        source (`str`): A folder of images (one sub-folder per class, or no sub-folders; see [`read_image_folder`]), a
            folder of parquet files, one parquet file, or the id of a data set on the Hub.
        image_column (`str`): The column of images.
        split (`str`): The split to load.
        label_column (`str`, *optional*): The column of class labels, checked as a whole (see [`check_labels`]). Without a
            column `label` there are no labels; None, or "none", for no labels in any case.
        text_column (`str`, *optional*): The column of captions, for who wants them.

    Returns:
        `datasets.Dataset`: Its images are not decoded yet; see [`to_tensors`].

    Raises:
        ValueError: if `source` is a folder without images, has no such column, or has something else than a class as a
            label.
    """
    if not source:
        raise ValueError("Expected `dataset` to be a folder, a parquet file or a Hub data set id, but got nothing.")
    label = label_column if wants_labels(label_column) else None
    dataset = open_source(os.path.expanduser(source), split, label, text_column)
    needed = {"image_column": None if LATENTS in dataset.column_names else image_column, "text_column": text_column}
    needed["label_column"] = None if label == "label" else label
    for argument, column in needed.items():
        if column is not None and column not in dataset.column_names:
            hint = f", or {NO_LABELS!r} for no labels" if argument == "label_column" else ""
            raise ValueError(
                f"Expected `{argument}` to be one of {dataset.column_names}, the columns of {source!r}{hint}, "
                f"but got {column!r}."
            )
    # not decoded by `datasets`, so that an error can name the broken file
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image) or name == needed["image_column"]:
            try:
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
            except (TypeError, ValueError, pa.ArrowException) as error:
                raise ValueError(
                    f"Expected {name!r} to be a column of images, but got {feature} in {source!r}."
                ) from error
    return dataset if label is None or label not in dataset.column_names else check_labels(dataset, label)


def load_checked(args: DataArguments, source: str, split: str, is_quiet: bool = False) -> datasets.Dataset:
    """
    Load a data set as [`load_images`] does, check all its images (see [`readable_images`]), and print what was found.

    Args:
        args ([`DataArguments`]): Names the columns.
        source (`str`), split (`str`): See [`load_images`].
        is_quiet (`bool`): Print nothing, as in all processes but one.

    Raises:
        ValueError: as these two do.
    """
    dataset = load_images(source, args.image_column, split, args.label_column)
    for argument in ("image_column", "teacher_image_column"):
        column = getattr(args, argument)
        if column is not None and LATENTS not in dataset.column_names:
            if column not in dataset.column_names:
                raise ValueError(
                    f"Expected `{argument}` to be one of {dataset.column_names}, the columns of {source!r}, but got {column!r}."
                )
            dataset = readable_images(dataset, column, args.skip_unreadable, is_quiet, source)
    if not is_quiet:
        print(f"{source}: {describe_images(dataset, args.label_column)}", file=sys.stderr)
    return dataset


def describe_images(dataset: datasets.Dataset, label_column: str | None = "label") -> str:
    """
    Say in one sentence what a data set holds, such as `9 images, 3 classes: bus 3, car 3, train 3`.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        label_column (`str`, *optional*): The column of class labels, as given to [`load_images`]; None to say nothing of
            classes.
    """
    kind = LATENTS if LATENTS in dataset.column_names else "images"
    number = f"{len(dataset)} {kind if len(dataset) != 1 else kind[:-1]}"
    notes = [dataset.info.description] if is_image_folder(dataset) and dataset.info.description else []
    if label_column is None:
        return "; ".join([number, *notes])
    if not wants_labels(label_column) or label_column not in dataset.column_names:
        if not wants_labels(label_column):
            notes.insert(0, "no labels asked for")
        elif not is_image_folder(dataset):
            notes.insert(0, f"no column {label_column!r}")
        return f"{number}, unconditional: {'; '.join(notes)}"
    names, counts = class_names(dataset, label_column) or [], class_counts(dataset, label_column)
    counted = [f"{name} {count}" for name, count in zip(names, counts)]
    if len(names) > MAX_CLASSES_SAID:
        counted = [*counted[:3], f"… ({len(names) - 4} more)", counted[-1]]
        notes.insert(0, f"{min(counts)} to {max(counts)} images in a class")
    if missing := [name for name, count in zip(names, counts) if not count]:
        notes.insert(0, f"without images: {shorten(missing)}")
    classes = f"{len(names)} class{'es' if len(names) != 1 else ''}: {', '.join(counted)}"
    return "; ".join([f"{number}, {classes}", *notes])


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
        image_fit (`str`): How an image becomes a square: `crop` (its centre) or `pad` (with the background).
        background (`str`): The colour of padding, and behind transparent pixels unless there are four channels.

    Raises:
        ValueError: if `channels` has another value; and, on reading, if an item is not an image (the file is named).
    """

    image_size: int
    channels: int
    image_column: str = "image"
    label_column: str = "label"
    teacher_image_column: str | None = None
    teacher_image_size: int | None = None
    image_fit: str = "crop"
    background: str = BACKGROUND

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
        images = (open_image(encoded, self.channels, self.background) for encoded in column)
        return [to_tensor(fit_square(image, size, self.image_fit, self.background)) for image in images]


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
        image_fit=args.image_fit,
        background=args.background,
    )
