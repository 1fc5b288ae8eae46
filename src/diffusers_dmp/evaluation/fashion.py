"""The data of the text demo: the 70,000 pictures of Fashion-MNIST, 28 x 28 grey pixels, and captions made of their labels.
https://arxiv.org/abs/1708.07747
"""

import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import PIL.Image

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
    rows = {"image": [{"bytes": _png(image), "path": None} for image in images], "text": list(captions)}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()
