"""Read and write ADM's sample batches: an `.npz` with uint8 images (N, H, W, 3) in `arr_0` and labels (N,) in `arr_1`.
https://github.com/openai/guided-diffusion/tree/main/evaluations

One batch is in memory at a time: 50,000 images of 256 x 256 pixels are 10 GB.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..saving.reading import beginning_of, expect_binary
from ..saving.whole import written_whole

IMAGES, LABELS = "arr_0", "arr_1"


def write_npz(
    path: "str | os.PathLike", batches: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray | None = None
) -> None:
    """
    Write an `.npz` file. If an error interrupts the writing, no file is left under its name.

    Args:
        path: The file's name.
        batches (of `np.ndarray` of shape (n, H, W, C)): uint8.
        shape: (N, H, W, C) of all images together.
        labels (`np.ndarray` of shape (N,), *optional*): int64.

    Raises:
        ValueError: if the batches do not match `shape`.
    """
    with (
        written_whole(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with _entry(archive, IMAGES) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_2_0(file, header)
            written = 0
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                    raise ValueError(
                        f"Expected uint8 images of the shape {shape[1:]}, but got {batch.dtype} {batch.shape[1:]}."
                    )
                file.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        if written != shape[0]:
            raise ValueError(f"Expected {shape[0]} images, but got {written}.")
        if labels is not None:
            with _entry(archive, LABELS) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(labels, dtype=np.int64))


class NpzImages:
    """
    The images of an `.npz` file.

    Args:
        path: The file's name.

    Raises:
        ValueError: if the file is not an `.npz` file or is incomplete, or if its images are not uint8 (N, H, W, 3 or 1).
    """

    def __init__(self, path: "str | os.PathLike"):
        self.path = Path(path)
        expect_binary(beginning_of(path, "a whole .npz file"), path, "a whole .npz file")
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
                if f"{IMAGES}.npy" in names:
                    with archive.open(f"{IMAGES}.npy") as file:
                        self.shape, is_fortran, dtype = _read_header(file)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"Expected {str(path)!r} to be a whole .npz file, but got {error}.") from error
        if f"{IMAGES}.npy" not in names:
            raise ValueError(f"Expected {str(path)!r} to hold images in {IMAGES!r}, but got {names}.")
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] not in (1, 3) or is_fortran:
            raise ValueError(
                f"Expected {IMAGES!r} in {str(path)!r} to be uint8 of the shape (N, H, W, 3), but got {dtype} {self.shape}."
            )
        if not self.shape[0]:
            raise ValueError(f"Expected {str(path)!r} to hold images, but got none.")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def labels(self) -> np.ndarray | None:
        """The labels (N,); None if the file has none."""
        return read_arrays(self.path, LABELS).get(LABELS)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """
        Yield the images in order, as uint8 arrays of shape (n, H, W, 3); grey images get three equal channels.

        Args:
            batch_size (`int`): n, except in the last batch.

        Raises:
            ValueError: if the file is damaged.
        """
        size = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
                _read_header(file)
                for start in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - start)
                    content = file.read(count * size)
                    if len(content) != count * size:
                        raise ValueError(
                            f"Expected {str(self.path)!r} to hold {len(self)} images, but it ends in number {start}."
                        )
                    images = np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])
                    yield np.broadcast_to(images, (*images.shape[:3], 3))
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"Expected {str(self.path)!r} to be a whole .npz file, but got {error}.") from error


def read_arrays(path: "str | os.PathLike", *names: str) -> dict[str, np.ndarray]:
    """
    Read those of some arrays that an `.npz` file has.

    Args:
        path: The file's name.
        names (`str`): The arrays' names.

    Raises:
        ValueError: if the file is damaged, or an array needs code to be executed.
    """
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names if name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"Expected {str(path)!r} to be a whole .npz file, but got {error}.") from error


def _entry(archive: zipfile.ZipFile, name: str):
    # the name that NumPy uses, and always the same date, so that equal images make equal files
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)
