"""Where a data set comes from: a folder of images, parquet files, or the Hub."""

import os
from pathlib import Path
from typing import Any

import datasets
import yaml
from huggingface_hub import metadata_load

from .folders import read_image_folder
from .listing import Listing, choose_rows, list_files, shorten, split_of_file
from .shards import expect_parquet


def open_source(
    source: str, split: str, label_column: str | None = None, text_column: str | None = None
) -> datasets.Dataset:
    """
    Open a data set, as it is.

    Args:
        source (`str`): A folder of images or of parquet files, one parquet file, or the id of a data set on the Hub.
        split (`str`): The split to load.
        label_column (`str`, *optional*), text_column (`str`, *optional*): What to look for in a folder of images; see
            [`read_image_folder`].

    Raises:
        ValueError: if there is no such data set.
    """
    if os.path.isfile(source):
        return _load_parquet(source, {"train": [source]}, split)
    if not os.path.isdir(source):
        if source.startswith((".", os.sep)) or source.count("/") > 1:
            raise ValueError(f"Expected {source!r} to be a folder or file, but there is none.")
        return _load_dataset(source, source, split=split)
    listing = list_files(source)
    if listing.images and listing.parquet:
        raise ValueError(
            f"Expected {source!r} to be a folder of images or of parquet files, but got both: "
            f"{shorten(listing.images, 2)} and {shorten(listing.parquet, 2)}. Give the folder of the one or the other."
        )
    if not listing.images and _has_hub_configuration(source):
        return _load_dataset(source, source, split=split)
    if not listing.parquet:
        return read_image_folder(listing, split, label_column, text_column)
    return _load_parquet(source, _splits_of_parquet(listing), split)


def _has_hub_configuration(folder: str) -> bool:
    """Whether a folder is a copy of a repository on the Hub that says itself which file belongs to which split."""
    try:
        return "configs" in (metadata_load(os.path.join(folder, "README.md")) or {})
    except (OSError, yaml.YAMLError):  # none, or none that the Hub would read
        return False


def _splits_of_parquet(listing: Listing) -> dict[str, list[str]]:
    """
    The parquet files of each split; all of them are `train` if no name begins with a split, as in `test-00000-of-00001`.

    Raises:
        ValueError: if some names begin with a split, and others not.
    """
    splits: dict[str | None, list[str]] = {}
    for path in listing.parquet:
        splits.setdefault(split_of_file(path), []).append(path)
    if None in splits and len(splits) > 1:
        raise ValueError(
            f"Expected all parquet files in {listing.folder!r} to have names that begin with train, validation or test, "
            f"or none, but got {shorten(splits[None], 3)} beside others."
        )
    return {
        split or "train": [os.path.join(listing.folder, path) for path in paths] for split, paths in splits.items()
    }


def _load_parquet(source: str, splits: dict[str, list[str]], split: str) -> datasets.Dataset:
    """
    Load parquet files, through the cache of `datasets`.

    Raises:
        ValueError: if one of them is not such a file; it is named.
    """
    sizes = {}
    for name, files in splits.items():
        sizes[name] = 0
        for file in files:
            try:
                sizes[name] += expect_parquet(Path(file))
            except (OSError, ValueError) as error:
                if file.endswith(".parquet"):
                    raise
                raise ValueError(
                    f"Expected {source!r} to be a folder of images, or parquet files, but got {file!r}, which is none. "
                    "Archives have to be unpacked."
                ) from error
    parts = choose_rows(split, sizes, source)
    loaded = _load_dataset(source, "parquet", data_files={name: splits[name] for name, _ in parts})
    chosen = [loaded[name].select(range(sizes[name])[rows]) for name, rows in parts]
    return chosen[0] if len(chosen) == 1 else datasets.concatenate_datasets(chosen)


def _load_dataset(source: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with an error that names the source."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"Expected {source!r} to be a folder with images, parquet, or a data set on the Hub, but got: {error}"
        ) from error
