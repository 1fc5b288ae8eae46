"""Write files and folders completely or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: "str | os.PathLike") -> Iterator[Path]:
    """
    Write a file or folder under a temporary name, and rename it when it is complete, over what was there before.

    ```py
    with written_whole(folder / "model.json") as unfinished:
        unfinished.write_text(text)
    ```

    Args:
        path: The final name. Folders above it are made.

    Yields:
        `Path`: Where to write. After an exception the temporary file stays there, and `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield unfinished_path(path)
    finish(path)


def unfinished_path(path: Path) -> Path:
    """Return the temporary name of `path`, for several processes that write one folder, of which one calls [`finish`]."""
    return path.with_name(path.name + ".unfinished")


def finish(path: Path) -> None:
    """Rename `unfinished_path(path)` to `path`, over what was there before."""
    if path.is_dir():
        shutil.rmtree(path)
    unfinished_path(path).replace(path)
