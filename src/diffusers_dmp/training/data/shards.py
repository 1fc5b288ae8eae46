"""Data sets that are made in parquet shards: by any number of processes, each its own, and on where it was interrupted."""

import json
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from ...saving.whole import written_whole

MAX_WAIT = timedelta(days=1)  # of a process for the others' last shards; accelerators' own patience is ten minutes


def make_shard_accelerator() -> Accelerator:
    """The processes that share the work."""
    patience = InitProcessGroupKwargs(timeout=MAX_WAIT)
    return Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])


def remember_settings(path: Path, settings: dict[str, Any], of: str) -> None:
    """
    Record what decides the shards beside `path`, or compare it with what is recorded there.

    Args:
        path (`Path`): The record, in their folder, which is made if need be.
        settings (`dict[str, Any]`): What JSON can hold.
        of (`str`): What the shards are, for the error.

    Raises:
        ValueError: if one differs from what is recorded.
    """
    if not path.exists():
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n")
        return
    recorded = json.loads(path.read_text())
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"Expected `{name}` to be {recorded.get(name)!r}, as in the {of} that {str(path.parent)!r} holds, "
                f"but got {value!r}."
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
    Write `train-<i>-of-<n>.parquet` into `output_dir`, whole or not at all. What is there already is kept.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        num_items (`int`), shard_size (`int`): Rows in all, and of a shard.
        make_shard (`Callable`): From the rows of a shard, and the progress to update, to the shard.
        description (`str`): Of the progress.
    """
    num_shards = math.ceil(num_items / shard_size)
    paths = [Path(output_dir, f"train-{shard:05d}-of-{num_shards:05d}.parquet") for shard in range(num_shards)]
    missing = [shard for shard, path in enumerate(paths) if not path.exists()]
    accelerator.wait_for_everyone()  # so that all have seen the same ones
    rows = {shard: range(num_items)[shard * shard_size :][:shard_size] for shard in missing}
    own = missing[accelerator.process_index :: accelerator.num_processes]
    with tqdm(
        total=sum(len(rows[shard]) for shard in own),
        desc=description
        if accelerator.num_processes == 1
        else f"{description}, 1 of {accelerator.num_processes} processes",
        unit="image",
        disable=not accelerator.is_main_process,
    ) as progress:
        for shard in own:
            made = make_shard(rows[shard], progress)
            with written_whole(paths[shard]) as unfinished:
                made.to_parquet(unfinished)
