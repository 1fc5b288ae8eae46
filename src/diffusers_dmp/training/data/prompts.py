"""Prompts of images: reading them from a file, the rule which image has which, and their hash."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from ...saving.reading import parsed_json, read_text
from .shards import expect_parquet

PROMPT = "prompt"  # the column


def read_prompts(path: "str | os.PathLike", column: str = PROMPT) -> list[str]:
    """
    Read prompts from a file.

    Args:
        path: A text file (`.txt`) with one prompt in each line; or a table (`.jsonl`, `.csv`, `.parquet`, or `.json` with a list of
            objects); or a list of strings (`.json`).
        column (`str`): The table's column.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is of another format, holds no prompts, has no such column, or one of its prompts is empty or no text.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"Expected the prompts in a file of {', '.join(_READERS)}, but got {str(path)!r}.")
    rows = _READERS[suffix](path)
    if not rows:
        raise ValueError(f"Expected {str(path)!r} to hold prompts, but got none.")
    prompts = [row.get(column, row) if isinstance(row, Mapping) else row for row in rows]
    for number, prompt in enumerate(prompts, 1):
        place = f"{'line' if suffix in ('.txt', '.jsonl') else 'row'} {number}"
        if isinstance(prompt, Mapping):
            raise ValueError(
                f"Expected {str(path)!r} to have the column {column!r}, but {place} has {', '.join(prompt) or 'none'}; "
                "`--prompt_column` names it."
            )
        if not isinstance(prompt, str) or not prompt.strip():
            got = "is empty" if prompt is None or isinstance(prompt, str) else f"is {prompt!r}"
            raise ValueError(f"Expected {str(path)!r} to hold a prompt in each {place.split()[0]}, but {place} {got}.")
    return [prompt.strip() for prompt in prompts]


def prompts_of(indices: Iterable[int], prompts: Sequence[str]) -> list[str]:
    """
    Return the prompts of images: image i has prompt i modulo the number of prompts.

    Args:
        indices (of `int`): The images.
        prompts (`Sequence[str]`): All prompts.
    """
    return [prompts[index % len(prompts)] for index in indices]


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Hash prompts, in their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _lines(path: "str | os.PathLike") -> list[str]:
    # not `splitlines`, which also splits at characters that a prompt may hold
    return read_text(path).removesuffix("\n").split("\n")


def _json_lines(path: "str | os.PathLike") -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected {str(path)!r} to be JSON lines, but line {number} is not: {error}.") from error
    return rows


def _json_list(path: "str | os.PathLike") -> list[Any]:
    rows = parsed_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"Expected {str(path)!r} to hold a JSON list of prompts, but got {type(rows).__name__}.")
    return rows


def _csv(path: "str | os.PathLike") -> list[Any]:
    return list(csv.DictReader(io.StringIO(read_text(path), newline="")))


def _parquet(path: "str | os.PathLike") -> list[Any]:
    expect_parquet(Path(path))
    file = pa.parquet.ParquetFile(path)
    # the others may be images
    texts = [each.name for each in file.schema_arrow if each.type in (pa.string(), pa.large_string())]
    return file.read(texts).to_pylist()


_READERS: dict[str, Callable[["str | os.PathLike"], list[Any]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
