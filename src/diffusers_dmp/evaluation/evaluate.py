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
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, but got {self.batch_size}.")


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
    statistics = _stored_statistics(args.reference) if extractor.is_inception else {}
    size = _check_images(extractor, generated, reference, bool(statistics), device)
    found, _ = _look_at(extractor, generated, args.batch_size, device)
    real, real_sha256 = _look_at(extractor, reference, args.batch_size, device)

    metrics = {"FID": _distance(found.pooled, real.pooled, statistics.get("pooled"))}
    numbers = [len(found.pooled)] if "spatial" in statistics else [len(found.pooled), len(real.pooled)]
    if found.spatial is not None and min(numbers) <= found.spatial.shape[1]:
        logger.warning(
            "Without sFID: it wants more than %d images, as many as there are features by place, but got %d.",
            found.spatial.shape[1],
            min(numbers),
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
        {"num_samples": len(found.pooled), "image_size": size},
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


def _check_images(
    extractor: FeatureExtractor,
    generated: "NpzImages | DatasetImages",
    reference: "NpzImages | DatasetImages",
    has_statistics: bool,
    device: torch.device,
) -> list[int]:
    """
    By the first of them, before all are looked at.

    Returns:
        Height and width.

    Raises:
        ValueError: if the two are of different sizes, or too few for a covariance.
    """
    (first,), (real,) = next(generated.batches(1)), next(reference.batches(1))
    if first.shape != real.shape:
        raise ValueError(
            f"Expected generated images of the reference's size {real.shape[:2]}, but got {first.shape[:2]}."
        )
    dim = extract_features(extractor, [first[None]], device).pooled.shape[1]
    for images, name in [(generated, "generated")] + [(reference, "reference")] * (not has_statistics):
        if len(images) <= dim:
            raise ValueError(
                f"Expected more than {dim} {name} images, as many as the extractor has features, for a covariance that can "
                f"be trusted, but got {len(images)}."
            )
    return list(first.shape[:2])


def _look_at(
    extractor: FeatureExtractor, images: "NpzImages | DatasetImages", batch_size: int, device: torch.device
) -> tuple[Features, str]:
    """Features, and a hash of the pixels, however they are packed."""
    digest = hashlib.sha256()

    def batches() -> Iterator[np.ndarray]:
        for batch in images.batches(batch_size):
            digest.update(np.ascontiguousarray(batch).data)
            yield batch

    return extract_features(extractor, batches(), device), digest.hexdigest()


def _some(features: torch.Tensor) -> torch.Tensor:
    """As many as precision and recall look at, of all: data sets are often sorted by class."""
    if len(features) <= MAX_NEIGHBOURHOOD:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_NEIGHBOURHOOD]]


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
