"""The rows of encoded images and captions, read as a stream: the files that hold them, and a process's share of them."""

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfFileSystem

from .encoded_rows import HEIGHT, PROMPT, WIDTH, Columns, read_rows
from .encoding_record import COMPONENTS
from .images import LATENTS

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}  # of `datasets`, by the files that they read
Size = tuple[int, int]  # height and width in pixels
Sample = tuple[Size, Columns]


@dataclass(kw_only=True)
class StreamedShards:
    """
    Shards of encoded images and captions, of which the files are known, and the rows only when they are read.

    Args:
        source (`str`): Their folder, or the id of a data set on the Hub.
        files (`list[str]`): Their paths, all of one kind.
        encoding (`dict[str, Any]`): The record of what encoded them.
        empty_prompt (`dict[str, torch.Tensor]`): The columns of the empty prompt, each of shape (1, …).
    """

    source: str
    files: list[str]
    encoding: dict[str, Any]
    empty_prompt: Columns

    def __len__(self) -> int:
        return self.encoding["num_images"]

    def rows(self, seed: int, epoch: int, process: int, num_processes: int) -> datasets.IterableDataset:
        """The rows that a process reads in an epoch, in which the files have an order of their own."""
        files = np.random.default_rng([seed, epoch]).permutation(np.array(self.files, dtype=object)).tolist()
        builder = BUILDERS[Path(files[0]).suffix]
        rows: Any = datasets.load_dataset(builder, data_files={"train": files}, split="train", streaming=True)
        return split_dataset_by_node(rows, process, num_processes)

    @cached_property
    def samples(self) -> list[Columns]:
        """The first row, with tensors."""
        return [sample_of(row)[1] for row in islice(self.rows(0, 0, 0, 1), 1)]

    def identity(self) -> dict[str, Any]:
        """What identifies them, wherever they lie, as far as it can be known without reading them."""
        components = self.encoding[COMPONENTS]
        return {
            "images": len(self),
            "files": len(self.files),
            "dtype": self.encoding["dtype"],
            "pipeline": self.encoding["pipeline_class"],
            "encoders": {name: record.get("weights") for name, record in components.items() if "weights" in record},
        }

    def describe(self) -> str:
        """What they are in a few words."""
        return f"a stream of {len(self)} images with captions, encoded for {self.encoding['pipeline_class']}, in {len(self.files)} files"


def sample_of(row: dict[str, Any]) -> Sample:
    """The size in pixels and the tensors of a row of parquet, or of a tar with the same bytes and a JSON file of the rest."""
    rest = row.get("json") or row
    columns = read_rows({LATENTS: [row[LATENTS]], PROMPT: [row[PROMPT]]})
    return (int(rest[HEIGHT]), int(rest[WIDTH])), {name: values[0] for name, values in columns.items()}


def list_shards(source: str) -> list[str]:
    """
    The files of a stream: parquet, or else tars of WebDataset.

    Args:
        source (`str`): A folder, or the id of a data set on the Hub.

    Raises:
        ValueError: if there are none.
    """
    for suffix in BUILDERS:
        if os.path.isdir(source):
            found = [str(path) for path in sorted(Path(source).rglob(f"*{suffix}"))]
        else:
            found = [f"hf://{path}" for path in sorted(HfFileSystem().glob(f"datasets/{source}/**/*{suffix}"))]
        if found:
            return found
    raise ValueError(
        f"Expected {source!r} to have files {' or '.join(f'*{suffix}' for suffix in BUILDERS)} to stream, but got none."
    )
