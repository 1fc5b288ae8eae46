"""Write files and folders completely or not at all, also if the process is killed or the power fails."""

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
        `Path`: Where to write; nothing is there yet. After an exception the temporary file stays there, and `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished_path(path))  # what a run left there that was killed
    yield unfinished_path(path)
    finish(path)


def unfinished_path(path: Path) -> Path:
    """Return the temporary name of `path`, for several processes that write one folder, of which one calls [`finish`]."""
    return path.with_name(path.name + ".unfinished")


def finish(path: Path) -> None:
    """
    Rename `unfinished_path(path)` to `path`, over what was there before.

    Everything is on the disk before it gets its name: a file system may otherwise keep the new name and lose the content.
    """
    unfinished = unfinished_path(path)
    for folder, _, names in os.walk(unfinished):  # nothing for a file
        for name in names:
            _flush(Path(folder, name))
        _flush(Path(folder))
    _flush(unfinished)
    replaced = path.with_name(path.name + ".replaced")
    if path.is_dir():  # nothing replaces a folder in one step; out of the way at once, so that no half of it is seen
        _remove(replaced)
        path.rename(replaced)
    unfinished.replace(path)
    _flush(path.parent)
    _remove(replaced)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # which opens no folders, and flushes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
