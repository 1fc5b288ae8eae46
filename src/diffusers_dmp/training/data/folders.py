"""What a folder of images means: every image file in it counts, and each sub-folder is a class.

`datasets` would infer splits from words in the names of files and folders, and drop the classes at the first image that lies
elsewhere. Here the name of a file means nothing, and what could mean two things is refused.
"""

import os
import posixpath
from typing import Any

import datasets
import pyarrow as pa

from .labels import NO_LABELS
from .listing import METADATA_NAMES, Listing, choose_rows, group_by_folder, place, shorten, splits_of_images
from .metadata import read_captions, read_metadata

IMAGE, LABEL = "image", "label"  # the columns of a folder of images
IMAGE_FOLDER = "image_folder"  # the data set's `info.builder_name`

Splits = dict[str, tuple[str, list[str]]]  # see `splits_of_images`


def is_image_folder(dataset: datasets.Dataset) -> bool:
    """Whether [`read_image_folder`] made a data set: its images are files, and `info.description` says what was found."""
    return dataset.info.builder_name == IMAGE_FOLDER


def read_image_folder(
    listing: Listing, split: str = "train", label_column: str | None = LABEL, text_column: str | None = None
) -> datasets.Dataset:
    """
    Make a data set of the images of a folder.

    Args:
        listing ([`Listing`]): The folder's files.
        split (`str`): The split, for a folder whose sub-folders are called train, test and so on.
        label_column (`str`, *optional*): The column of labels: that of the metadata, if it has one, or else `label`, the
            names of the sub-folders. None for no labels.
        text_column (`str`, *optional*): The column of captions: that of the metadata, if it has one, or else the text of
            the `.txt` file beside each image. None for no captions.

    Returns:
        `datasets.Dataset`: With the columns `image` (not decoded), and labels and captions if they were asked for.

    Raises:
        ValueError: if the folder has no images, or could mean more than one thing.
    """
    if not listing.images:
        kinds = sorted({posixpath.splitext(path)[1] or path for path in listing.others}) or ["no files"]
        raise ValueError(
            f"Expected {listing.folder!r} to be a folder with images or parquet files, but got none of them: it "
            f"has {shorten(kinds)}. Archives have to be unpacked."
        )
    metadata = read_metadata(listing)
    splits = splits_of_images(listing, are_labelled=label_column is None or label_column in metadata.columns)
    chosen = choose_rows(split, {name: len(paths) for name, (_, paths) in splits.items()}, listing.folder)
    images = [path for name, rows in chosen for path in splits[name][1][rows]]
    columns = {IMAGE: _encoded(listing, images)}
    features: dict[str, Any] = {IMAGE: datasets.Image(decode=False)}

    notes = [f"in {splits[name][0]}" for name, _ in chosen if splits[name][0]]
    if label_column is not None and label_column in metadata.columns:
        columns[label_column] = _as_array(label_column, metadata.column(label_column, images, listing))
        notes.append(f"labels of {shorten(listing.metadata)}")
    elif label_column == LABEL:
        names, labels, notes = _folder_labels(listing, splits, chosen)
        if names is not None:
            columns[LABEL], features[LABEL] = pa.array(labels, pa.int64()), datasets.ClassLabel(names=names)
    elif label_column is not None:
        raise ValueError(
            f"Expected `label_column` to be {LABEL!r}, for the sub-folders of {listing.folder!r}, or a column of its "
            f"metadata, {sorted(metadata.columns)}, or {NO_LABELS!r}, but got {label_column!r}."
        )
    if text_column is not None:
        in_metadata = text_column in metadata.columns
        if metadata.columns and not in_metadata and not listing.captions:
            raise ValueError(
                f"Expected `text_column` to be a column of the metadata in {listing.folder!r}, {sorted(metadata.columns)}, but got "
                f"{text_column!r}."
            )
        texts = metadata.column(text_column, images, listing) if in_metadata else read_captions(listing, images)
        columns[text_column] = _as_array(text_column, texts)

    notes += _other_splits(splits, chosen)
    if listing.others:
        notes.append(f"other files: {shorten(listing.others, 3)}")
    return _make_dataset(columns, features, listing.folder, "; ".join(notes))


def _make_dataset(
    columns: dict[str, pa.Array], features: dict[str, Any], folder: str, description: str
) -> datasets.Dataset:
    """A data set of columns; features that are not given are those of the values."""
    for name in columns.keys() - features.keys():
        features |= datasets.Features.from_arrow_schema(pa.schema({name: columns[name].type}))
    info = datasets.DatasetInfo(
        description=description,
        builder_name=IMAGE_FOLDER,
        config_name=os.path.abspath(folder),
        features=datasets.Features({name: features[name] for name in columns}),
    )
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(columns)), info=info)


def class_folders(listing: Listing, prefix: str, images: list[str]) -> tuple[str, dict[str, list[str]]]:
    """
    The sub-folders that are classes; images nested deeper belong to the one that they are in.

    Args:
        listing ([`Listing`]): The folder's files.
        prefix (`str`): Where to look.
        images (`list[str]`): All images in `prefix`.

    Returns:
        `tuple[str, dict]`: `prefix`, or the folder that it holds and nothing else; and the images by the name of their
        sub-folder of that. There is no sub-folder or more than one.

    Raises:
        ValueError: if there are images beside the sub-folders.
    """
    while True:
        direct, groups = group_by_folder(images, prefix)
        if direct and groups:
            raise ValueError(
                f"Expected {place(listing, prefix)!r} to have all its images in sub-folders, one for each class, or none, "
                f"but got {shorten(direct, 3)} beside the sub-folders {shorten(list(groups))}. Move them, or name the "
                f"classes in {METADATA_NAMES[0]}, or train without classes: `--label_column {NO_LABELS}`."
            )
        if len(groups) != 1:
            return prefix, groups
        prefix += f"{next(iter(groups))}/"


def _folder_labels(
    listing: Listing, splits: Splits, chosen: list[tuple[str, slice]]
) -> tuple[list[str] | None, list[int], list[str]]:
    """The names of the classes, the label of each image, and what is worth saying about the folders."""
    names: list[str] | None = None
    labels: list[int] = []
    notes = []
    for number, (split, rows) in enumerate(chosen):
        prefix, groups = class_folders(listing, *splits[split])
        if number and list(groups) != (names or []):
            raise ValueError(
                f"Expected all splits of {listing.folder!r} to have the same sub-folders, but got {shorten(names or [])} "
                f"and {shorten(list(groups))}."
            )
        names = list(groups) or None
        index = {name: label for label, name in enumerate(groups)}
        if groups:
            labels += [index[path[len(prefix) :].partition("/")[0]] for path in splits[split][1][rows]]
        siblings = [posixpath.split(path) for path in sorted(listing.folders)]
        empty = [name for parent, name in siblings if parent == prefix.rstrip("/") and name not in groups]
        where = f"in {prefix}" if prefix else ""
        notes += [where] if groups and where else []
        notes += [f"no sub-folders {where}".strip()] if not groups else []
        notes += [f"no images in {shorten(empty)}"] if groups and empty else []
    return names, labels, notes


def _other_splits(splits: Splits, chosen: list[tuple[str, slice]]) -> list[str]:
    """What is worth saying about the splits that were not asked for."""
    others = [f"{folder} ({len(paths)})" for name, (folder, paths) in splits.items() if name not in dict(chosen)]
    return [f"other splits: {', '.join(others)}"] if others else []


def _encoded(listing: Listing, images: list[str]) -> pa.Array:
    """The column of images as `datasets` stores it: without bytes, and with the absolute path."""
    files = [os.path.abspath(os.path.join(listing.folder, path)) for path in images]
    return pa.StructArray.from_arrays(
        [pa.nulls(len(files), pa.binary()), pa.array(files, pa.string())], ["bytes", "path"]
    )


def _as_array(name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"Expected the values of {name!r} in the metadata to be of one type, but got: {error}"
        ) from error
