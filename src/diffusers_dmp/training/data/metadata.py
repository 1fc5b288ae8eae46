"""What stands beside the images of a folder: `metadata.jsonl` or `metadata.csv` with labels or captions, and `.txt` captions."""

import csv
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .listing import CAPTION_SUFFIX, Listing, place, shorten

FILE_NAME = "file_name"


@dataclass
class Metadata:
    """
    The rows of all metadata files of a folder.

    Args:
        rows (`dict[str, dict]`): The columns of each image that has a row, by its path relative to the folder.
        columns (`set[str]`): The columns that some row has.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)

    def column(self, name: str, images: list[str], listing: Listing) -> list[Any]:
        """
        The values of a column, one for each image.

        Raises:
            ValueError: if an image has none, if a row is of no image, or if the values are of several types.
        """
        missing = [image for image in images if self.rows.get(image, {}).get(name) is None]
        if missing:
            raise ValueError(
                f"Expected the metadata in {listing.folder!r} to have a {name!r} for each image, but got none for "
                f"{len(missing)} of {len(images)}: {shorten(missing)}."
            )
        strangers = sorted(set(self.rows) - set(listing.images))
        if strangers:
            raise ValueError(
                f"Expected each `{FILE_NAME}` of the metadata in {listing.folder!r} to be an image there, but got "
                f"{shorten(strangers)}."
            )
        values = [self.rows[image][name] for image in images]
        for image, value in zip(images, values):
            if type(value) is not type(values[0]):
                raise ValueError(
                    f"Expected all values of {name!r} in the metadata of {listing.folder!r} to be of one type, but got "
                    f"{values[0]!r} for {images[0]} and {value!r} for {image}."
                )
        return values


def read_metadata(listing: Listing) -> Metadata:
    """
    Read all metadata files of a folder; `file_name` is relative to the folder that the file lies in.

    Raises:
        ValueError: if a row cannot be read, or has no `file_name`, or if two rows are of one image; the line is named.
    """
    metadata = Metadata()
    for path in listing.metadata:
        for line, row in _rows(Path(listing.folder, path)):
            where = f"{place(listing, path)}, line {line}"
            if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
                raise ValueError(
                    f"Expected each row of the metadata to have a `{FILE_NAME}`, but got none in {where}."
                )
            image = posixpath.normpath(posixpath.join(posixpath.dirname(path), row.pop(FILE_NAME).replace("\\", "/")))
            if image in metadata.rows:
                raise ValueError(
                    f"Expected one row of metadata for each image, but got a second for {image} in {where}."
                )
            metadata.rows[image] = row
            metadata.columns |= row.keys()
    return metadata


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a metadata file, with the number of their lines."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
            else:
                yield from ((number, json.loads(line)) for number, line in enumerate(file, 1) if line.strip())
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be UTF-8 text with one row in each line, but got: {error}"
        ) from error


def read_captions(listing: Listing, images: list[str]) -> list[str]:
    """
    Read the `.txt` file beside each image.

    Raises:
        ValueError: if an image has none.
    """
    paths = [posixpath.splitext(image)[0] + CAPTION_SUFFIX for image in images]
    present = set(listing.captions)
    missing = [image for image, path in zip(images, paths) if path not in present]
    if missing:
        raise ValueError(
            f"Expected a caption for each image in {listing.folder!r}, in a {CAPTION_SUFFIX} file beside it or in the "
            f"metadata, but got none for {len(missing)} of {len(images)}: {shorten(missing)}."
        )
    captions = []
    for path in paths:
        try:
            captions.append(Path(listing.folder, path).read_text(encoding="utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"Expected {place(listing, path)!r} to be UTF-8 text, but got: {error}") from error
    return captions
