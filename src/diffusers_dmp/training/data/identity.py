"""What identifies data wherever they lie: short hashes of labels, names and weights."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import datasets
import pyarrow.compute
import torch
from diffusers import AutoencoderKL


def images_identity(dataset: datasets.Dataset, label_column: str, image_column: str) -> dict[str, Any]:
    """What identifies a data set wherever it lies: its number of images, labels, and files' names."""
    names = dataset.column_names
    return {
        "images": len(dataset),
        "labels": digest(map(str, dataset[label_column])) if label_column in names else None,
        "image files": digest(_file_names(dataset, image_column)) if image_column in names else None,
    }


def digest(texts: Iterable[str]) -> str:
    """A short hash of texts in their order."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode() + b"\n")
    return total.hexdigest()[:12]


def weights_digest(vae: AutoencoderKL) -> str:
    """A short hash of a VAE's weights and scale."""
    total = hashlib.sha256(repr((vae.config.scaling_factor, vae.config.get("shift_factor"))).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def _file_names(dataset: Any, image_column: str) -> Iterable[str]:
    """The names, without folders, of a data set's image files; empty ones where images have no name."""
    column = dataset.select_columns([image_column]).with_format("arrow")
    for rows in column.iter(10_000):
        entries = rows[image_column]
        if not pyarrow.types.is_struct(entries.type):
            return
        yield from (os.path.basename(path or "") for path in pyarrow.compute.struct_field(entries, "path").to_pylist())
