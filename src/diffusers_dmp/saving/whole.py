"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: "str | os.PathLike") -> Iterator[Path]:
    """
    Write a file or folder under another name, and give it its own when it is complete. What was there before is replaced.

    ```py
    with written_whole(folder / "model.json") as unfinished:
        unfinished.write_text(text)
    ```

    Args:
        path: Its name. Folders above it are made.

    Yields:
        `Path`: Where to write. After an exception it stays there and `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield unfinished_path(path)
    finish(path)


def unfinished_path(path: Path) -> Path:
    """Where to write what is to become `path`; for several processes that write one folder, of which one calls [`finish`]."""
    return path.with_name(path.name + ".unfinished")


def finish(path: Path) -> None:
    """Give what was written to `unfinished_path(path)` its name, in the place of what has it."""
    if path.is_dir():
        shutil.rmtree(path)
    unfinished_path(path).replace(path)
