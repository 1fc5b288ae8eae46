"""What a figure depends on, kept with it, so that only like is compared with like."""

import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..saving.version import __version__

# Figures compare only if these agree.
DECISIVE = (
    "extractor_sha256",
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
    "dtype",
    "tf32",
)


def make_fingerprint(
    extractor: dict[str, str], reference: dict[str, Any], images: dict[str, Any], sampling: dict[str, Any]
) -> dict[str, Any]:
    """
    All of it in one dictionary.

    Args:
        extractor, reference, images (`dict`): What [`evaluate`] knows of each.
        sampling (`dict`): What `sampling.json` beside the images holds; empty for images of unknown origin.
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
    Args:
        first, second (`dict`): Fingerprints.
        may_differ (of `str`): What is compared, a guidance scale say.

    Raises:
        ValueError: if they disagree in something that matters; all of that is listed.
    """
    differences = [
        f"{name} ({first.get(name)!r} and {second.get(name)!r})"
        for name in DECISIVE
        if name not in may_differ and first.get(name) != second.get(name)
    ]
    if differences:
        raise ValueError(f"Expected results that were measured alike, but got others in {', '.join(differences)}.")


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """What a record beside the images says; nothing if there is none."""
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
