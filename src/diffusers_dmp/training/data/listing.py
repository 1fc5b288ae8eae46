"""The files of a folder, by what they are: images, captions, metadata, parquet; and the splits that they belong to."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets

from .labels import NO_LABELS, natural_key

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
# what systems leave beside the files, in lower case; beside all hidden ones
IGNORED = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"})

# the names that folders and parquet files of a split have, as in `datasets`
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass
class Listing:
    """
    The files below a folder, as paths relative to it, with `/` between their parts, in natural order.

    Args:
        folder (`str`): The folder.
        images, captions, metadata, parquet, others (`list[str]`): Its files, by kind.
        folders (`set[str]`): All folders below it.
    """

    folder: str
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def list_files(folder: str) -> Listing:
    """
    List all files below a folder, whatever their names, through links too; hidden ones do not count.

    Args:
        folder (`str`): The folder.
    """
    listing = Listing(folder)
    for path in _walk(folder, "", (os.path.realpath(folder),), listing.folders):
        suffix = posixpath.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            listing.images.append(path)
        elif posixpath.basename(path) in METADATA_NAMES:
            listing.metadata.append(path)
        elif suffix == CAPTION_SUFFIX:
            listing.captions.append(path)
        elif suffix == PARQUET_SUFFIX:
            listing.parquet.append(path)
        else:
            listing.others.append(path)
    return listing


def _walk(folder: str, prefix: str, ancestors: tuple[str, ...], folders: set[str]) -> Iterator[str]:
    """The files below `folder/prefix`, in natural order; their folders are added to `folders`."""
    with os.scandir(os.path.join(folder, prefix)) as entries:
        by_name = {entry.name: entry for entry in entries}
    for name in sorted(by_name, key=natural_key):
        if name.startswith(".") or name.lower() in IGNORED:
            continue
        entry, path = by_name[name], prefix + name
        if not entry.is_dir():
            yield path  # a broken link as well: it cannot be read later, which names it
        elif (real := os.path.realpath(entry.path)) not in ancestors:  # else a link to a folder that it is in
            folders.add(path)
            yield from _walk(folder, f"{path}/", (*ancestors, real), folders)


def group_by_folder(paths: list[str], prefix: str) -> tuple[list[str], dict[str, list[str]]]:
    """The paths directly in a folder (`prefix`, which ends with `/`), and the others by its sub-folder that they are in."""
    direct, groups = [], defaultdict(list)
    for path in paths:
        name, slash, _ = path[len(prefix) :].partition("/")
        if slash:
            groups[name].append(path)
        else:
            direct.append(path)
    return direct, dict(groups)


def split_of(name: str) -> str | None:
    """The split that the name of a folder stands for: train, validation, test, or None."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), None)


def split_of_file(path: str) -> str | None:
    """The split of a parquet file, by the word that its name begins with, or by its folder."""
    *parents, name = path.split("/")
    word = name.replace("_", "-").replace(".", "-").split("-")[0]
    folders = [split_of(parent) for parent in reversed(parents)]
    return split_of(word) or next((split for split in folders if split is not None), None)


def splits_of_images(listing: Listing, are_labelled: bool = False) -> dict[str, tuple[str, list[str]]]:
    """
    The splits of a folder of images: each split's own folder (which ends with `/`), and the images in it.

    A folder whose sub-folders are all called train, test, validation or the like has those splits. Any other folder is one
    split, `train`; words in the names of files mean nothing. Folders that hold one folder and nothing else are passed
    through.

    Args:
        listing ([`Listing`]): The folder's files.
        are_labelled (`bool`): Whether the classes are known, or none are wanted, so that sub-folders are no classes.

    Raises:
        ValueError: if some sub-folders are called like splits, and others not, and they may be classes.
    """
    prefix = ""
    while True:
        direct, groups = group_by_folder(listing.images, prefix)
        splits = [split for split in map(split_of, groups) if split is not None]
        if len(splits) > 1 and (direct or len(splits) < len(groups) or len(set(splits)) < len(splits)):
            if are_labelled:
                return {"train": (prefix, listing.images)}
            raise ValueError(
                f"Expected {place(listing, prefix)!r} to have one sub-folder for each class, or for each of the splits "
                f"train, validation and test, but got {shorten(list(groups) + direct)}. Give the folder of one split, "
                f"or name the classes in {METADATA_NAMES[0]}, or train without classes: `--label_column {NO_LABELS}`."
            )
        if groups and len(splits) == len(groups) and not direct:
            return {split: (f"{prefix}{name}/", groups[name]) for split, name in zip(splits, groups)}
        if direct or len(groups) != 1:
            return {"train": (prefix, listing.images)}
        prefix += f"{next(iter(groups))}/"


def place(listing: Listing, path: str) -> str:
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
    parts = [part.partition("[") for part in (list(sizes) if split == "all" else split.split("+"))]
    split = "+".join((split_of(name.strip()) or name) + bracket + rest for name, bracket, rest in parts)
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
