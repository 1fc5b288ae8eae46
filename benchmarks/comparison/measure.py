"""Metrics of a run's images, and the bounds that real images and noise give.

Legend: N images.
"""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_dmp.evaluation.digits import fit_reader
from diffusers_dmp.evaluation.evaluate import EvaluationArguments, evaluate
from diffusers_dmp.evaluation.images import DatasetImages, open_images
from diffusers_dmp.evaluation.npz import NpzImages, write_npz
from diffusers_dmp.evaluation.sample import NPZ_NAME

from .data import EXTRACTOR, HELD_OUT, TRAIN, noise_images
from .plan import Plan

METRICS = ("FID", "KID", "precision", "recall", "recognised")  # that the results contain


def measure(plan: Plan, data: str, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Compare images with those that were trained on.

    Args:
        plan ([`Plan`]): For the data set's folder.
        data (`str`): The data set's name.
        source (`Path`): An `.npz` file or a folder of images.

    Returns:
        The metrics by name, and their fingerprint.
    """
    folder = plan.data_folder(data)
    arguments = EvaluationArguments(
        generated=str(source),
        reference=str(folder / TRAIN),
        extractor=str(folder / EXTRACTOR),
        output=str(source.with_suffix(".evaluation.json")),
    )
    results = evaluate(arguments)
    metrics = {result["metric"]: result["value"] for result in results if result["metric"] in METRICS}
    if data == "digits":
        metrics["recognised"] = _recognised(source, str(folder / TRAIN))
    return metrics, results[0]["settings"]


def measure_bounds(plan: Plan, name: str) -> dict[str, Any]:
    """
    Measure real images that were not trained on, and as many images of noise: the best and the worst that can be expected.

    Args:
        plan ([`Plan`]): For the data set's folder and settings.
        name (`str`): The data set's name.

    Returns:
        The metrics and fingerprints of `real` and `noise`, the data set's settings, the number of images and the commit.
    """
    folder = plan.data_folder(name)
    held_out = DatasetImages(str(folder / HELD_OUT))
    size = next(held_out.batches(1)).shape[1:]
    noise = folder / "noise" / NPZ_NAME
    noise.parent.mkdir(exist_ok=True)
    write_npz(noise, [noise_images(len(held_out), size)], (len(held_out), *size))
    bounds: dict[str, Any] = {}
    for bound, source in (("real", folder / HELD_OUT), ("noise", noise)):
        metrics, fingerprint = measure(plan, name, source)
        bounds[bound] = metrics | {"fingerprint": fingerprint}
    return bounds | {"settings": plan.data[name], "number": len(held_out), "commit": commit()}


def commit() -> str:
    """Return the commit of the code that runs."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _recognised(source: Path, train: str) -> float | None:
    """
    Compute the share of digits that a logistic regression reads as their label; None if there are no labels.

    The regression is fitted on the images in `train`. It is another kind of model than those that generate and measure.
    """
    pixels, labels = _read_digits(source)
    if labels is None:
        return None
    reader = fit_reader(*_read_digits(train))
    return round(float((reader.predict(pixels) == labels).mean()), 4)


def _read_digits(source: "str | Path") -> tuple[np.ndarray, np.ndarray | None]:
    """Read pixels in [0, 1] as (N, 64), and labels (N,) if there are any."""
    images = open_images(source)
    labels = images.labels if isinstance(images, NpzImages) else np.array(images.dataset["label"])
    pixels = np.concatenate([batch[..., 0] for batch in images.batches(100)])
    return pixels.reshape(len(pixels), -1) / 255, labels
