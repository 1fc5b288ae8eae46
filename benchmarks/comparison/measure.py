"""Metrics of a run's images, and the bounds that real images and noise give.

Legend: N images.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from diffusers_dmp.evaluation.evaluate import EvaluationArguments, evaluate
from diffusers_dmp.evaluation.images import open_images
from diffusers_dmp.evaluation.judge import load_judge, share_recognised
from diffusers_dmp.evaluation.npz import NpzImages, write_npz
from diffusers_dmp.evaluation.sample import NPZ_NAME
from diffusers_dmp.models.vision import ImagePreprocessor, processor_settings

from .checks import code_commit
from .data import EXTRACTOR, JUDGE, REFERENCE, TRAIN, noise_images
from .plan import Plan
from .results import BY_INCEPTION, INCEPTION_FINGERPRINT

METRICS = ("FID", "KID", "precision", "recall")  # of the evaluation
RECOGNISED = "recognised"


def measure(plan: Plan, data: str, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Compare images with real ones that were not trained on.

    Args:
        plan ([`Plan`]): For the data set's folder.
        data (`str`): The data set's name.
        source (`Path`): An `.npz` file.

    Returns:
        The metrics by name, and their fingerprint.
    """
    folder = plan.data_folder(data)
    values, fingerprint = _evaluate(plan, data, source, folder / EXTRACTOR)
    metrics: dict[str, Any] = {name: values[name] for name in METRICS}
    return metrics | {RECOGNISED: recognised(folder / JUDGE, source)}, fingerprint


def measure_by_inception(plan: Plan, data: str, source: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Compare images with real ones by the network of published FIDs, if the plan names its weights.

    Args:
        plan ([`Plan`]), data (`str`), source (`Path`): As of [`measure`].

    Returns:
        The metric and its fingerprint, each by its name in a result; nothing without weights.
    """
    if not plan.inception:
        return {}, {}
    values, fingerprint = _evaluate(plan, data, source, plan.inception)
    return {BY_INCEPTION: values["FID"]}, {INCEPTION_FINGERPRINT: fingerprint}


def _evaluate(plan: Plan, data: str, source: Path, extractor: "str | Path") -> tuple[dict[str, float], dict[str, Any]]:
    """Compute all metrics of an extractor, by name, and their fingerprint."""
    arguments = EvaluationArguments(
        generated=str(source),
        reference=str(plan.data_folder(data) / REFERENCE),
        extractor=str(extractor),
        output=str(source.with_suffix(".evaluation.json")),
    )
    results = evaluate(arguments)
    return {result["metric"]: result["value"] for result in results}, results[0]["settings"]


def measure_bounds(plan: Plan, name: str) -> dict[str, Any]:
    """
    Measure real images that were trained on, and as many images of noise: the best and the worst that can be expected.

    Args:
        plan ([`Plan`]): For the data set's folder and settings.
        name (`str`): The data set's name.

    Returns:
        The metrics and fingerprints of `real` and `noise`, with FID by Inception if the plan names its weights; the share of test images that the extractor and the judge classify
        rightly (`accuracy`), the data set's settings, the number of images and the commit.
    """
    folder = plan.data_folder(name)
    images, labels = read_images(folder / TRAIN)
    images, labels = images[: plan.num_images], labels[: plan.num_images]
    noise = noise_images(len(images), images.shape[1:])
    bounds: dict[str, Any] = {}
    for bound, pixels, classes in (("real", images, labels), ("noise", noise, None)):
        source = folder / bound / NPZ_NAME
        source.parent.mkdir(exist_ok=True)
        write_npz(source, [pixels], pixels.shape, classes)
        metrics, fingerprint = measure(plan, name, source)
        further, further_fingerprint = measure_by_inception(plan, name, source)
        bounds[bound] = metrics | {"fingerprint": fingerprint} | further | further_fingerprint
    accuracy = {"extractor": accuracy_of_extractor(folder), "judge": recognised(folder / JUDGE, folder / REFERENCE)}
    return bounds | {"accuracy": accuracy, "settings": plan.data[name], "number": len(images), "commit": code_commit()}


def recognised(judge: Path, source: Path) -> float | None:
    """
    Compute the share of images whose class a classifier recognises; None if there are no labels.

    It is another kind of network than those that generate, guide and extract features.
    """
    images, labels = read_images(source)
    if labels is None:
        return None
    return share_recognised(load_judge(judge), images[..., 0], labels)


@torch.no_grad()
def accuracy_of_extractor(folder: Path) -> float:
    """Compute the share of test images that the extractor of a data set's folder classifies rightly."""
    network = AutoModelForImageClassification.from_pretrained(folder / EXTRACTOR).eval()
    settings = processor_settings(str(folder / EXTRACTOR))
    preprocess = ImagePreprocessor(**{name.removeprefix("image_"): value for name, value in settings.items()})
    images, labels = read_images(folder / REFERENCE)
    return share_recognised(lambda pixels: (network(preprocess(pixels)).logits,), images[..., 0], labels)


def read_images(source: "str | Path") -> tuple[np.ndarray, np.ndarray | None]:
    """Read images as uint8 (N, H, W, C), and labels (N,) if there are any."""
    images = open_images(str(source))
    labels = images.labels if isinstance(images, NpzImages) else np.array(images.dataset["label"])
    return np.concatenate(list(images.batches(1000))), labels
