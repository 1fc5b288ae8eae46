"""A quick look at every image of a data set before anything is computed with them; it is remembered, so that it costs once."""

import hashlib
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from ...saving.whole import written_whole
from .decoding import UNREADABLE, probe_image
from .folders import is_image_folder
from .workers import num_threads

RECORDS = "diffusers_dmp_checked"  # in the cache of `datasets`
CHUNK = 1024  # images that are handed to the threads at once
LISTED = 10  # unreadable images that an error lists
POLICY = 1  # to be raised when `decoding` refuses what it did not before

logger = logging.getLogger(__name__)


@dataclass
class _Findings:
    """What a scan found: the rows that can be read, those that cannot and why, and the number of images with several frames."""

    readable: list[int] = field(default_factory=list)
    unreadable: dict[int, str] = field(default_factory=dict)
    animated: int = 0


def readable_images(
    dataset: datasets.Dataset,
    column: str = "image",
    skip_unreadable: bool = False,
    is_quiet: bool = False,
    source: str | None = None,
) -> datasets.Dataset:
    """
    Check that all images of a data set can be read: each is decoded once, a JPEG at an eighth of its size.

    Those that can be read are remembered in the cache of `datasets`: files by path, size and time of change, the rows of
    parquet files and of the Hub by the data set's fingerprint.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        column (`str`): The column of images.
        skip_unreadable (`bool`): Go on without the images that cannot be read.
        is_quiet (`bool`): Print nothing, as in all processes but one.
        source (`str`, *optional*): Where they are from, for the error.

    Returns:
        `datasets.Dataset`: The rows whose image can be read.

    Raises:
        ValueError: if an image cannot be read, unless it is to be skipped; or if none can.
    """
    keys, record = _keys(dataset, column), _record(dataset, column)
    known = _load(record)
    unknown = np.flatnonzero(~np.isin(keys, known))
    findings = _Findings()
    try:
        _scan(dataset.select_columns([column]), unknown, findings, is_quiet)
    finally:  # what was looked at counts, also when the rest was interrupted
        if findings.readable and (is_image_folder(dataset) or len(findings.readable) == len(unknown)):
            _save(record, np.union1d(known, keys[findings.readable]))
    if findings.animated and not is_quiet:
        print(
            f"Of {findings.animated} of {len(dataset)} images, which have several frames, the first is used.",
            file=sys.stderr,
        )
    if not findings.unreadable:
        return dataset
    listed = [f"row {row}: {reason}" for row, reason in findings.unreadable.items()]
    wanted = f"Expected {repr(source) if source else 'the data set'} to hold readable images"
    if not skip_unreadable:
        raise ValueError(
            f"{wanted}, but {len(listed)} of {len(dataset)} are not: "
            f"{'; '.join(listed[:LISTED])}{'; …' if len(listed) > LISTED else ''}. `--skip_unreadable` goes on without "
            "them."
        )
    if len(listed) == len(dataset):
        raise ValueError(f"{wanted}, but none is: {listed[0]}.")
    if not is_quiet:
        print(
            "\n".join([f"Skipped, as they cannot be read: {len(listed)} of {len(dataset)} images", *listed]),
            file=sys.stderr,
        )
    return dataset.select([row for row in range(len(dataset)) if row not in findings.unreadable])


def _scan(dataset: datasets.Dataset, rows: np.ndarray, findings: _Findings, is_quiet: bool) -> None:
    """Look at some rows of a data set with one column, in several threads, and add to the findings."""
    (column,) = dataset.column_names
    is_terminal = sys.stderr.isatty()
    with (
        ThreadPoolExecutor(num_threads()) as threads,
        tqdm(
            total=len(rows),
            desc="Checking images",
            unit="image",
            disable=is_quiet,
            delay=1,
            mininterval=0.1 if is_terminal else 30,
        ) as progress,
    ):
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK].tolist()
            for row, found in zip(chunk, threads.map(_probe, dataset[chunk][column])):
                if isinstance(found, str):
                    findings.unreadable[row] = found
                else:
                    findings.readable.append(row)
                    findings.animated += found
            progress.update(len(chunk))


def _probe(encoded: dict[str, Any] | None) -> "bool | str":
    """Whether an image has several frames, or why it cannot be read."""
    try:
        return probe_image(encoded)
    except ValueError as error:
        return str(error).removeprefix(UNREADABLE)


def _keys(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """A number for each row, which another image would not have; 0 for a file that is not there."""
    if not is_image_folder(dataset):
        return np.full(len(dataset), _hash(dataset._fingerprint, column), np.uint64)
    images = dataset.select_columns([column]).with_format("arrow")[:][column]
    paths = pc.struct_field(images, "path").to_pylist()
    return np.fromiter(map(_file_key, paths), np.uint64, len(paths))


def _file_key(path: str) -> int:
    try:
        stat = os.stat(path)
    except OSError:
        return 0
    return _hash(path, stat.st_size, stat.st_mtime_ns)


def _hash(*values: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr((POLICY, *values)).encode(), digest_size=8).digest()) or 1


def _record(dataset: datasets.Dataset, column: str) -> Path:
    """The file with the keys of a data set's images that can be read."""
    source = dataset.info.config_name if is_image_folder(dataset) else dataset._fingerprint
    return Path(datasets.config.HF_DATASETS_CACHE, RECORDS, f"{_hash(source, column):016x}.npy")


def _load(record: Path) -> np.ndarray:
    try:
        return np.load(record)
    except (OSError, ValueError, EOFError):  # none yet, or a damaged one
        return np.array([], np.uint64)


def _save(record: Path, keys: np.ndarray) -> None:
    try:
        with written_whole(record) as unfinished, open(unfinished, "wb") as file:
            np.save(file, keys)
    except OSError as error:
        logger.warning("That the images can be read is not remembered, as %s cannot be written: %s", record, error)
