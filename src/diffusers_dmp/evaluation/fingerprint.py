"""The fingerprint of a metric: everything that its value depends on. Only values with matching fingerprints are compared."""

import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..saving.reading import read_json
from ..saving.version import __version__

# Metrics may be compared only if these entries are equal.
DECISIVE = (
    "extractor_sha256",
    "clip_sha256",
    "prompts_sha256",
    "reference_sha256",
    "num_reference",
    "stored_statistics_sha256",
    "num_samples",
    "image_size",
    "num_inference_steps",
    "scheduler",
    "scheduler_sha256",
    "vae_sha256",
    "guidance_scale",
    "guidance_channels",
    "pipeline_arguments",
    "dtype",
    "tf32",
)


def make_fingerprint(
    extractor: dict[str, str], reference: dict[str, Any], images: dict[str, Any], sampling: dict[str, Any]
) -> dict[str, Any]:
    """
    Make the fingerprint, one dictionary that JSON can store.

    Args:
        extractor (`dict`): Name and hash of the feature extractor, or of the CLIP.
        reference (`dict`): Name, hash and number of the real images, or of the prompts.
        images (`dict`): Number and size of the generated images.
        sampling (`dict`): The content of `sampling.json` beside the images; empty if there is no such file.

    Returns:
        All of it and the versions of the libraries.
    """
    versions = {
        "diffusers_dmp": __version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {**extractor, **reference, **sampling, **images, "versions": versions}


def expect_comparable(first: dict[str, Any], second: dict[str, Any], may_differ: "tuple[str, ...]" = ()) -> None:
    """
    Check that two metrics were measured in the same way.

    Args:
        first, second (`dict`): Their fingerprints.
        may_differ (of `str`): Entries that may differ, for example the guidance scale if that is what is compared.

    Raises:
        ValueError: if other decisive entries differ; the error lists them all.
    """
    differences = [
        f"{name} ({first.get(name)!r} and {second.get(name)!r})"
        for name in DECISIVE
        if name not in may_differ and first.get(name) != second.get(name)
    ]
    if differences:
        raise ValueError(f"Expected results that were measured alike, but got others in {', '.join(differences)}.")


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Read the JSON file `name` in `folder`; an empty dictionary if there is no such file."""
    path = folder / name
    return read_json(path) if path.is_file() else {}
