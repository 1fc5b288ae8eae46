"""FID and its kin of images that were generated, against real ones:

python -m diffusers_dmp.evaluation.evaluate --generated outputs/demo/samples/samples.npz --reference outputs/demo/digits \\
  --extractor digits --output outputs/demo/evaluation.json
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training.arguments import option, parse_arguments
from .features import FeatureExtractor, Features, extract_features
from .fingerprint import make_fingerprint, read_settings
from .images import DatasetImages, open_images
from .metrics import GaussianStatistics, frechet_distance, inception_score, kernel_distance, precision_and_recall
from .npz import NpzImages
from .sample import SETTINGS_NAME

MAX_NEIGHBOURHOOD = 10_000  # real images that precision and recall look at, as ADM's reference batches have

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationArguments:
    generated: str = option("", "The images to judge: an .npz file, a folder, parquet or a Hub data set.")
    reference: str = option("", "The real ones, likewise; ADM's reference batches with the statistics that they hold.")
    reference_split: str = option("train", "Of a data set.")
    extractor: str = option("", "inception (or its file), digits, or a vision model's folder or Hub id.")
    output: str = option("evaluation.json", "Where the figures are written, each with its fingerprint.")
    batch_size: int = option(100, "Images at a time.")

    def __post_init__(self):
        for name in ("generated", "reference", "extractor"):
            if not getattr(self, name):
                raise ValueError(f"Expected `{name}` to be given, but got nothing.")


def evaluate(args: EvaluationArguments) -> list[dict[str, Any]]:
    """
    Judge images, and write the figures as a model card takes them over: `metric`, `value`, `dataset` and `settings`.

    Returns:
        FID, sFID and Inception Score where the extractor allows for them, KID, precision and recall.

    Raises:
        ValueError: if the images of the two are of different sizes, or there are too few of them for their features.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = FeatureExtractor(args.extractor).to(device)
    generated, reference = open_images(args.generated), open_images(args.reference, args.reference_split)
    found, size, _ = _look_at(extractor, generated, args.batch_size, device)
    real, real_size, real_sha256 = _look_at(extractor, reference, args.batch_size, device)
    if size != real_size:
        raise ValueError(f"Expected generated images of the reference's size {real_size}, but got {size}.")
    _check_number(found, "generated")
    statistics = _stored_statistics(args.reference) if extractor.is_inception else {}
    if not statistics:
        _check_number(real, "reference")

    metrics = {"FID": _distance(found.pooled, real.pooled, statistics.get("pooled"))}
    if found.spatial is not None and min(len(found.spatial), len(real.spatial)) <= found.spatial.shape[1]:
        logger.warning(
            "Without sFID: it wants more than %d images, as many as there are features by place, but got %d and %d.",
            found.spatial.shape[1],
            len(found.spatial),
            len(real.spatial),
        )
    elif found.spatial is not None:
        metrics["sFID"] = _distance(found.spatial, real.spatial, statistics.get("spatial"))
    if found.logits is not None:
        metrics["Inception Score"] = inception_score(found.logits)[0]
    metrics["KID"] = kernel_distance(found.pooled, real.pooled)[0]
    metrics["precision"], metrics["recall"] = precision_and_recall(found.pooled, _some(real.pooled))

    fingerprint = make_fingerprint(
        extractor.fingerprint,
        {
            "reference": args.reference,
            "reference_sha256": real_sha256,
            "num_reference": len(real.pooled),
            "stored_statistics_sha256": _statistics_sha256(statistics),
        },
        {"num_samples": len(found.pooled), "image_size": list(size)},
        read_settings(Path(args.generated).parent, SETTINGS_NAME),
    )
    dataset = Path(args.reference).name
    results = [
        {"metric": name, "value": round(value, 6), "dataset": dataset, "settings": fingerprint}
        for name, value in metrics.items()
    ]
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _look_at(
    extractor: FeatureExtractor, images: "NpzImages | DatasetImages", batch_size: int, device: torch.device
) -> tuple[Features, tuple[int, int], str]:
    """Features, height and width, and a hash of the pixels, however they are packed."""
    size, digest = None, hashlib.sha256()

    def batches() -> Iterator[np.ndarray]:
        nonlocal size
        for batch in images.batches(batch_size):
            size = batch.shape[1:3]
            digest.update(np.ascontiguousarray(batch).data)
            yield batch

    features = extract_features(extractor, batches(), device)
    return features, size, digest.hexdigest()


def _some(features: torch.Tensor) -> torch.Tensor:
    """As many as precision and recall look at, of all: data sets are often sorted by class."""
    if len(features) <= MAX_NEIGHBOURHOOD:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_NEIGHBOURHOOD]]


def _check_number(features: Features, name: str) -> None:
    number, dim = features.pooled.shape
    if number <= dim:
        raise ValueError(
            f"Expected more than {dim} {name} images, as many as the extractor has features, for a covariance that can be "
            f"trusted, but got {number}."
        )


def _distance(generated: torch.Tensor, real: torch.Tensor, stored: GaussianStatistics | None) -> float:
    return frechet_distance(GaussianStatistics.of(generated), stored or GaussianStatistics.of(real))


def _statistics_sha256(statistics: dict[str, GaussianStatistics]) -> str | None:
    digest = hashlib.sha256()
    for kind, stored in sorted(statistics.items()):
        digest.update(kind.encode())
        for tensor in (stored.mean, stored.covariance):
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest() if statistics else None


def _stored_statistics(reference: str) -> dict[str, GaussianStatistics]:
    """Of the whole data set, which ADM's reference batches keep beside some of its images."""
    if not reference.endswith(".npz"):
        return {}
    with np.load(reference) as file:
        names = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
        return {
            kind: GaussianStatistics(
                torch.from_numpy(file[mean]).double(), torch.from_numpy(file[sigma]).double(), None
            )
            for kind, (mean, sigma) in names.items()
            if mean in file.files and sigma in file.files
        }


if __name__ == "__main__":
    for result in evaluate(parse_arguments(EvaluationArguments)):
        print(f"{result['metric']}: {result['value']}")
