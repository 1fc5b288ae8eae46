"""Write files and folders completely or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
        `Path`: Where to write. After an exception nothing is left there, and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(unfinished_path(path))  # what a killed process left
    try:
        yield unfinished_path(path)
        _flush_contents(unfinished_path(path))
    except BaseException:
        remove(unfinished_path(path))
        raise
    _rename(path)


def write_json(path: "str | os.PathLike", content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def unfinished_path(path: Path) -> Path:
    """Return the temporary name of `path`, for several processes that write one folder, of which one calls [`finish`]."""
    return path.with_name(path.name + ".unfinished")


def finish(path: Path) -> None:
    """Rename `unfinished_path(path)` to `path`, over what was there before, when all of it is on the disk."""
    _flush_contents(unfinished_path(path))
    _rename(path)


def _flush_contents(path: Path) -> None:
    for file in [*path.rglob("*"), path]:
        flush(file)


def _rename(path: Path) -> None:
    """Give what is complete its final name. Whenever this is interrupted, the old or the new is there, whole."""
    if path.is_dir():  # which cannot be replaced in one step
        remove(_removed_path(path))
        path.replace(_removed_path(path))
    unfinished_path(path).replace(path)
    flush(path.parent)
    remove(_removed_path(path))


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there; a folder loses its name first, so that no half of it keeps the name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if path != _removed_path(path):
        remove(_removed_path(path))
        path = path.replace(_removed_path(path))
    shutil.rmtree(path)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what a killed process left of files and folders whose names begin with `prefix`: halves without a final name."""
    for path in [*folder.glob(f"{prefix}*.unfinished"), *folder.glob(f"{prefix}*.removed")]:
        remove(path)


def _removed_path(path: Path) -> Path:
    """The name under which a folder is removed."""
    return path if path.suffix == ".removed" else path.with_name(path.name + ".removed")


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk and would survive a crash of the computer."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and needs no such call
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
