"""The files of a folder, by what they are: images, captions, metadata, parquet; and the splits that they belong to."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

import datasets

from .labels import natural_key

# photo formats that Pillow reads, and three that it does not read by itself, so that they are refused and not passed over
IMAGE_SUFFIXES = frozenset(
    {
        ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg",
        ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
        ".heic", ".heif", ".jxl",
    }
)  # fmt: skip
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_SUFFIX = ".txt"
PARQUET_SUFFIX = ".parquet"
IGNORED_FOLDERS = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})
IGNORED_FILES = frozenset({"thumbs.db", "desktop.ini"})  # beside all hidden ones

# the names that folders and parquet files of a split have, as in `datasets`
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Listing:
    """
    The files below a folder, as paths relative to it in natural order.

    Args:
        folder (`str`): The folder.
        images, captions, metadata, parquet, others (`list[PurePath]`): Its files, by kind.
        folders (`set[PurePath]`): All folders below it.
    """

    folder: str
    images: list[PurePath] = field(default_factory=list)
    captions: list[PurePath] = field(default_factory=list)
    metadata: list[PurePath] = field(default_factory=list)
    parquet: list[PurePath] = field(default_factory=list)
    others: list[PurePath] = field(default_factory=list)
    folders: set[PurePath] = field(default_factory=set)


def list_files(folder: str) -> Listing:
    """
    List all files below a folder, whatever their names, through links too; hidden ones do not count.

    Args:
        folder (`str`): The folder.
    """
    listing = Listing(folder)
    for path in sorted(_walk(folder, PurePath(), (os.path.realpath(folder),), listing.folders), key=_path_key):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            listing.images.append(path)
        elif path.name in METADATA_NAMES:
            listing.metadata.append(path)
        elif suffix == CAPTION_SUFFIX:
            listing.captions.append(path)
        elif suffix == PARQUET_SUFFIX:
            listing.parquet.append(path)
        else:
            listing.others.append(path)
    return listing


def _walk(folder: str, inside: PurePath, ancestors: tuple[str, ...], folders: set[PurePath]) -> Iterable[PurePath]:
    with os.scandir(os.path.join(folder, inside)) as entries:
        for entry in entries:
            name, path = entry.name.lower(), inside / entry.name
            if name.startswith(".") or name in IGNORED_FOLDERS | IGNORED_FILES:
                continue
            if not entry.is_dir():
                yield path  # a broken link as well: it cannot be read later, which names it
                continue
            real = os.path.realpath(entry.path)
            if real not in ancestors:  # else a link to a folder that it is in
                folders.add(path)
                yield from _walk(folder, path, (*ancestors, real), folders)


def _path_key(path: PurePath) -> list:
    return [natural_key(part) for part in path.parts]


def group_by_folder(paths: list[PurePath], prefix: PurePath) -> tuple[list[PurePath], dict[str, list[PurePath]]]:
    """The paths directly in a folder, and the others by the sub-folder of it that they are in."""
    direct, groups, depth = [], defaultdict(list), len(prefix.parts)
    for path in paths:
        if len(path.parts) == depth + 1:
            direct.append(path)
        else:
            groups[path.parts[depth]].append(path)
    return direct, dict(groups)


def split_of(name: str) -> str | None:
    """The split that the name of a folder stands for: train, validation, test, or None."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), None)


def split_of_file(path: PurePath) -> str | None:
    """The split of a parquet file, by the word that its name begins with, or by its folder."""
    word = path.stem.replace("_", "-").replace(".", "-").split("-")[0]
    folders = [split_of(part) for part in reversed(path.parts[:-1])]
    return split_of(word) or next((split for split in folders if split is not None), None)


def splits_of_images(listing: Listing, are_labelled: bool = False) -> dict[str, tuple[PurePath, list[PurePath]]]:
    """
    The splits of a folder of images: each split's own folder, and the images in it.

    A folder whose sub-folders are all called train, test, validation or the like has those splits. Any other folder is one
    split, `train`; words in the names of files mean nothing. Folders that hold one folder and nothing else are passed
    through.

    Args:
        listing ([`Listing`]): The folder's files.
        are_labelled (`bool`): Whether the classes are known, so that sub-folders are no classes.

    Raises:
        ValueError: if some sub-folders are called like splits, and others not.
    """
    prefix = PurePath()
    while True:
        direct, groups = group_by_folder(listing.images, prefix)
        splits = [split for split in map(split_of, groups) if split is not None]
        if len(splits) > 1 and (direct or len(splits) < len(groups) or len(set(splits)) < len(splits)):
            if are_labelled:
                return {"train": (prefix, listing.images)}
            raise ValueError(
                f"Expected {place(listing, prefix)!r} to have one sub-folder for each class, or for each of the splits "
                f"train, validation and test, but got {shorten(list(groups) + direct)}. Give the folder of one split, "
                f"or name the classes in {METADATA_NAMES[0]}."
            )
        if groups and len(splits) == len(groups) and not direct:
            return {split: (prefix / name, groups[name]) for split, name in zip(splits, groups)}
        if direct or len(groups) != 1:
            return {"train": (prefix, listing.images)}
        prefix = prefix / next(iter(groups))


def place(listing: Listing, path: PurePath) -> str:
    """A path relative to the folder, as errors name it."""
    return os.path.normpath(os.path.join(listing.folder, path))


def choose_rows(split: str, sizes: dict[str, int], source: str) -> list[tuple[str, slice]]:
    """
    The rows that a split means, such as `train`, `test[:10%]`, `train+test` or `all`.

    Args:
        split (`str`): As `datasets` writes it; `val`, `dev` and the like stand for what they are short for.
        sizes (`dict[str, int]`): The number of rows of each split that there is.
        source (`str`): Where they are from, for the error.

    Raises:
        ValueError: if there is no such split.
    """
    name, bracket, rest = split.partition("[")
    split = "+".join(sizes) if split == "all" else (split_of(name) or name) + bracket + rest
    try:
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"Expected the split of {source!r} to be one of {', '.join(sizes)}, but got {split!r}. A folder has splits "
            "if all its sub-folders are called train, validation, test or the like."
        ) from error
    return [(part.splitname, slice(part.from_, part.to)) for part in chosen]


def shorten(names: list, limit: int = 5) -> str:
    """Some names, and how many more there are."""
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more
