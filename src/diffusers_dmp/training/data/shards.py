"""Data sets written as parquet shards, by any number of processes; an interrupted run goes on with the missing shards."""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from ...saving.reading import beginning_of, expect_binary, read_json
from ...saving.whole import write_json, written_whole
from ..progress import progress_bar

logger = logging.getLogger(__name__)

MAX_WAIT = timedelta(days=1)  # for the other processes' last shards; by default a process waits ten minutes


def make_shard_accelerator() -> Accelerator:
    """The accelerator of the processes that share the work."""
    timeout = InitProcessGroupKwargs(timeout=MAX_WAIT)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[timeout])


def remember_settings(path: Path, settings: dict[str, Any], of: str) -> None:
    """
    Record the settings that the files of a folder depend on, or compare them with the settings recorded there.

    Args:
        path (`Path`): The record, in the folder of the files. The folder is made if it is missing.
        settings (`dict[str, Any]`): The settings, as JSON can hold them.
        of (`str`): What the files are, for the error.

    Raises:
        ValueError: if a setting differs from the one recorded.
    """
    if not path.exists():
        write_json(path, settings)
        return
    recorded = read_json(path)
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"Expected `{name}` to be {recorded.get(name)!r}, as in the {of} that {str(path.parent)!r} holds, "
                f"but got {value!r}; write into another folder."
            )


def write_shards(
    accelerator: Accelerator,
    output_dir: "str | Path",
    num_items: int,
    shard_size: int,
    make_shard: Callable[[range, tqdm], datasets.Dataset],
    description: str,
) -> None:
    """
    Write the missing and damaged ones of the shards `train-<i>-of-<n>.parquet`, each whole or not at all.

    A shard is written while the next one is made.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        output_dir (`str` or `Path`): The folder of the shards.
        num_items (`int`): The number of rows in all shards together.
        shard_size (`int`): The number of rows of a shard.
        make_shard (`Callable[[range, tqdm], Dataset]`): Makes a shard from the indices of its rows, and updates the
            progress bar by the number of rows done.
        description (`str`): The progress bar's description.
    """
    num_shards = math.ceil(num_items / shard_size)
    paths = [Path(output_dir, f"train-{shard:05d}-of-{num_shards:05d}.parquet") for shard in range(num_shards)]
    rows = {shard: range(num_items)[shard * shard_size :][:shard_size] for shard in range(num_shards)}
    missing = [shard for shard, path in enumerate(paths) if not (path.exists() and _is_whole(path, len(rows[shard])))]
    accelerator.wait_for_everyone()  # no process writes before all have looked
    own = missing[accelerator.process_index :: accelerator.num_processes]
    if accelerator.num_processes > 1:
        description = f"{description}, 1 of {accelerator.num_processes} processes"
    total = sum(len(rows[shard]) for shard in own)
    with (
        progress_bar(total, description, "image", disable=not accelerator.is_main_process) as progress,
        ThreadPoolExecutor(1) as writer,
    ):
        writing: list[Future] = []
        for shard in own:
            made = make_shard(rows[shard], progress)
            for previous in writing:
                previous.result()  # raises what kept it from being written
            writing = [writer.submit(_write, made, paths[shard])]
        for last in writing:
            last.result()


def _write(shard: datasets.Dataset, path: Path) -> None:
    with written_whole(path) as unfinished:
        shard.to_parquet(unfinished)


def expect_parquet(path: Path) -> int:
    """
    Return the number of rows of a parquet file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is cut off or no parquet.
    """
    kind = "a whole parquet file"
    beginning = beginning_of(path, kind)
    expect_binary(beginning, path, kind)
    try:
        return pa.parquet.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        reason = "it is cut off" if beginning.startswith(b"PAR1") else "got another kind of file"
        raise ValueError(f"Expected {str(path)!r} to be {kind}, but {reason}; make or download it again.") from error


def _is_whole(path: Path, num_rows: int) -> bool:
    """Whether a shard can be kept; of one that cannot, the log says so."""
    try:
        found = expect_parquet(path)
    except ValueError as error:
        logger.warning("%s It is written again.", error)
        return False
    if found != num_rows:
        logger.warning("Expected %s to hold %d rows, but got %d. It is written again.", path, num_rows, found)
    return found == num_rows
