"""The 70,000 pictures of Fashion-MNIST, 28 x 28 grey pixels, as data sets with labels or with captions made of them.
https://arxiv.org/abs/1708.07747

`python -m diffusers_dmp.evaluation.fashion outputs/fashion` writes what the presets `*_fashion.yaml` train on: the folders `train`
(60,000 pictures) and `test` (10,000).
"""

import argparse
import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image

from ..saving.whole import written_whole
from ..terminal import OneLineParser, run_command

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package `dataset-fashion-mnist` puts it
HUB_ID = "zalando-datasets/fashion_mnist"
FILES = {"train": "train", "test": "t10k"}  # 60,000 and 10,000 pictures
CLOTHES = (  # by label
    "a T-shirt",
    "a pair of trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
# the same without articles, for models of classes
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PHRASES = ("{}", "a photo of {}", "a picture of {}", "{} on a black background", "a small grey photo of {}")


def fashion_images(split: str = "train", folder: "str | os.PathLike" = FOLDER) -> tuple[np.ndarray, np.ndarray]:
    """
    Read Fashion-MNIST from Debian's package, or where that is not installed, from the Hub or its cache.

    Args:
        split (`str`): 'train' or 'test'.
        folder: Where the package's files are.

    Returns:
        The pictures as uint8 (N, 28, 28), white on black, and their labels as int64 (N,).

    Raises:
        ValueError: if there is no such split, a file is damaged, or the pictures cannot be had here.
    """
    if split not in FILES:
        raise ValueError(f"Expected `split` to be {' or '.join(map(repr, FILES))}, but got {split!r}.")
    if Path(folder).is_dir():
        images, labels = (
            _read_idx(Path(folder, f"{FILES[split]}-{part}-ubyte.gz")) for part in ("images-idx3", "labels-idx1")
        )
        return images, labels.astype(np.int64)
    try:
        rows = datasets.load_dataset(HUB_ID, split=split).with_format("numpy")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            "Expected Fashion-MNIST to be installed (`apt install dataset-fashion-mnist` on Debian and Ubuntu) or "
            f"{HUB_ID} to be reached on the Hub, but got neither: {' '.join(str(error).split())[:120]}"
        ) from error
    return np.stack(rows["image"][:]), np.asarray(rows["label"][:], np.int64)


def _read_idx(path: Path) -> np.ndarray:
    """
    Read an array of bytes in the format of MNIST: its number of dimensions is in the fourth byte, its sizes follow.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + shape.nbytes).reshape(shape.tolist())
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ValueError(f"Expected {str(path)!r} to hold an array of MNIST's format, but got {error}.") from error


def captions_of(
    labels: np.ndarray, names: Sequence[str] = CLOTHES, phrases: Sequence[str] = PHRASES, seed: int = 0
) -> list[str]:
    """
    Make a caption for each label, such as 'a photo of an ankle boot'.

    Args:
        labels (`np.ndarray` of shape (N,)): Indices of names.
        names (`Sequence[str]`): What each label stands for.
        phrases (`Sequence[str]`): With '{}' for the name; each caption is one of them.
        seed (`int`): Of the choice of phrases.

    Returns:
        `list[str]` of length N.
    """
    chosen = np.random.default_rng(seed).integers(len(phrases), size=len(labels))
    return [phrases[phrase].format(names[label]) for phrase, label in zip(chosen, labels, strict=True)]


def write_captioned_images(path: "str | os.PathLike", images: np.ndarray, captions: Sequence[str]) -> None:
    """
    Write pictures with captions as one parquet file, as data sets of the Hub have them.

    Args:
        path: The file.
        images (`np.ndarray` of shape (N, H, W)): uint8 grey values.
        captions (`Sequence[str]`): N of them.
    """
    _write_images(path, images, "text", list(captions), datasets.Value("string"))


def write_labelled_images(
    path: "str | os.PathLike", images: np.ndarray, labels: np.ndarray, names: Sequence[str] = CLASSES
) -> None:
    """
    Write pictures with classes as one parquet file, as data sets of the Hub have them.

    Args:
        path: The file.
        images (`np.ndarray` of shape (N, H, W)): uint8 grey values.
        labels (`np.ndarray` of shape (N,)): Indices of names.
        names (`Sequence[str]`): What each label stands for.
    """
    _write_images(path, images, "label", labels, datasets.ClassLabel(names=list(names)))


def write_fashion(folder: "str | os.PathLike") -> None:
    """
    Write all pictures with their classes: `train/images.parquet` and `test/images.parquet`; what is there is kept.

    Raises:
        ValueError: see [`fashion_images`].
    """
    for split in FILES:
        path = Path(folder, split, "images.parquet")
        if not path.exists():
            write_labelled_images(path, *fashion_images(split))


def _write_images(path: "str | os.PathLike", images: np.ndarray, column: str, values: Any, feature: Any) -> None:
    """Write pictures (N, H, W) with a value each as one parquet file."""
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], column: values}
    features = datasets.Features({"image": datasets.Image(), column: feature})
    with written_whole(path) as unfinished:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(unfinished)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def main(argv: list[str]) -> None:
    """Write the data set to the folder that the command line names."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="outputs/fashion")
    write_fashion(parser.parse_args(argv).folder)


if __name__ == "__main__":
    run_command(main, name="diffusers_dmp.evaluation.fashion")
