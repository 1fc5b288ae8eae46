"""FID and related metrics of generated images against real images:

python -m diffusers_dmp.evaluation.evaluate --generated outputs/demo/samples/samples.npz --reference outputs/demo/digits \\
  --extractor digits --output outputs/demo/evaluation.json

and the CLIP score of images that were sampled from prompts: `--clip openai/clip-vit-base-patch32`.
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

from ..saving.sources import check_source
from ..training.arguments import option
from ..training.data.prompts import PROMPT, prompts_sha256, read_prompts
from ..training.parsing import run_entry_point
from .clip_score import ClipScorer, clip_score
from .features import DIGITS, INCEPTION, FeatureExtractor, Features, extract_features
from .fingerprint import make_fingerprint, read_settings
from .images import DatasetImages, open_images, read_ahead
from .metrics import GaussianStatistics, frechet_distance, inception_score, kernel_distance, precision_and_recall
from .npz import NpzImages, read_arrays
from .sample import PROMPTS_NAME, SETTINGS_NAME

MAX_REFERENCE = 10_000  # real images for precision and recall, as many as ADM's reference batches have

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationArguments:
    """Arguments of [`evaluate`]."""

    generated: str = option(
        "", "The generated images: an .npz file, a folder, a parquet file or a data set on the Hub."
    )
    reference: str = option(
        "", "The real images, in the same formats; the statistics in ADM's reference batches are used."
    )
    reference_split: str = option("train", "Which split of the reference, if it is a data set.")
    image_column: str = option("image", "Column of images in the reference, if it is a data set.")
    generated_image_column: str = option("image", "The same for the generated images.")
    background: str = option("white", "Colour behind transparent pixels: a name or #rrggbb.")
    skip_unreadable: bool = option(False, "Leave out the images that cannot be read, and list them.")
    extractor: str = option("", "inception (or its file), digits, or a vision model's folder or Hub id.")
    clip: str | None = option(None, "Folder or Hub id of a CLIP of transformers, for the CLIP score.")
    prompts: str | None = option(
        None, f"File with the prompts of the generated images; by default the {PROMPTS_NAME} beside them."
    )
    prompt_column: str = option(PROMPT, "Column of prompts, if the file has columns.")
    output: str = option("evaluation.json", "JSON file for the metrics, each with its fingerprint.")
    batch_size: int = option(100, "Images per batch.")

    def __post_init__(self):
        for name in ("generated", *(("reference", "extractor") if self.compares else ())):
            if not getattr(self, name):
                raise ValueError(f"Expected `{name}` to be given, but got nothing.")
        for name in ("generated", "reference", "extractor"):
            if getattr(self, name) not in (INCEPTION, DIGITS):
                check_source(name, getattr(self, name), "file or folder")
        check_source("clip", self.clip)
        if self.clip and self.skip_unreadable:
            raise ValueError(
                "Expected no `skip_unreadable` with `clip`, as images after one left out would get others' prompts."
            )
        if self.batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, but got {self.batch_size}.")

    @property
    def compares(self) -> bool:
        """Whether the images are compared with real ones; otherwise the CLIP score alone is asked for."""
        return bool(self.reference or self.extractor or not self.clip)


def evaluate(args: EvaluationArguments) -> list[dict[str, Any]]:
    """
    Compute all metrics that the extractor allows, and the CLIP score, and write them to `args.output`.

    Args:
        args ([`EvaluationArguments`]): What to compare, and with which extractor.

    Returns:
        One dictionary per metric with `metric`, `value`, `dataset` and `settings` (the fingerprint), as model cards store them:
        FID, KID, precision and recall; sFID and Inception Score if the extractor has spatial features and logits; CLIP score
        with a CLIP.

    Raises:
        ValueError: if generated and real images differ in size, or if there are fewer images than features; if there are no
            prompts for a CLIP, or not those that the images were sampled from.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampling = read_settings(Path(args.generated).parent, SETTINGS_NAME)
    generated = open_images(
        args.generated,
        image_column=args.generated_image_column,
        background=args.background,
        skip_unreadable=args.skip_unreadable,
    )
    prompts = _prompts(args, len(generated), sampling) if args.clip else []
    results = _compare(args, generated, sampling, device) if args.compares else []
    results += _score_prompts(args, generated, prompts, sampling, device) if args.clip else []
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def print_metrics(args: EvaluationArguments) -> None:
    """Evaluate, and print each metric in a line."""
    for result in evaluate(args):
        print(f"{result['metric']}: {result['value']}")


def _compare(
    args: EvaluationArguments, generated: NpzImages | DatasetImages, sampling: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """Compare generated images with real ones."""
    extractor = FeatureExtractor(args.extractor).to(device)
    reference = open_images(
        args.reference, args.reference_split, args.image_column, args.background, args.skip_unreadable
    )
    statistics = _stored_statistics(args.reference) if extractor.is_inception else {}
    size = _check_images(extractor, generated, reference, bool(statistics), device)
    found, _ = _features_and_hash(extractor, generated, args.batch_size, device)
    real, real_sha256 = _features_and_hash(extractor, reference, args.batch_size, device)
    fingerprint = make_fingerprint(
        extractor.fingerprint,
        {
            "reference": args.reference,
            "reference_sha256": real_sha256,
            "num_reference": len(real.pooled),
            "stored_statistics_sha256": _statistics_sha256(statistics),
        },
        {"num_samples": len(found.pooled), "image_size": size},
        sampling,
    )
    metrics = _compute_metrics(found, real, statistics)
    return [_result(name, value, args.reference, fingerprint) for name, value in metrics.items()]


def _score_prompts(
    args: EvaluationArguments,
    generated: NpzImages | DatasetImages,
    prompts: list[str],
    sampling: dict[str, Any],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Compare generated images with their prompts."""
    scorer = ClipScorer(str(args.clip)).to(device)
    (first,) = next(generated.batches(1))
    value = clip_score(scorer, read_ahead(generated.batches(args.batch_size)), prompts)
    fingerprint = make_fingerprint(
        scorer.fingerprint,
        {"num_prompts": len(prompts), "prompts_sha256": prompts_sha256(prompts)},
        {"num_samples": len(generated), "image_size": list(first.shape[:2])},
        sampling,
    )
    return [_result("CLIP score", value, args.prompts or sampling.get("prompts") or PROMPTS_NAME, fingerprint)]


def _result(metric: str, value: float, source: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {"metric": metric, "value": round(value, 6), "dataset": Path(source).name, "settings": fingerprint}


def _prompts(args: EvaluationArguments, num_images: int, sampling: dict[str, Any]) -> list[str]:
    """The prompts of the generated images, given or beside them; they have to be those that they were sampled from."""
    beside = Path(args.generated).parent / PROMPTS_NAME
    if args.prompts is None and not beside.is_file():
        raise ValueError(f"Expected `prompts` for a CLIP score, as there is no {str(beside)!r}, but got nothing.")
    prompts = read_prompts(args.prompts or beside, args.prompt_column)[:num_images]
    if sampling.get("prompts_sha256") not in (None, prompts_sha256(prompts)):
        raise ValueError(
            f"Expected `prompts` to be those that the images were sampled from, as in {str(beside)!r}, but got others."
        )
    return prompts


def _compute_metrics(
    generated: Features, real: Features, statistics: dict[str, GaussianStatistics]
) -> dict[str, float]:
    """Compute the metrics by name; `statistics` by kind of feature replace those of the real images."""

    def distance(generated: torch.Tensor, real: torch.Tensor, stored: GaussianStatistics | None) -> float:
        return frechet_distance(GaussianStatistics.of(generated), stored or GaussianStatistics.of(real))

    metrics = {"FID": distance(generated.pooled, real.pooled, statistics.get("pooled"))}
    if generated.spatial is not None and real.spatial is not None:
        num_features = generated.spatial.shape[1]
        num_images = len(generated.pooled)
        if "spatial" not in statistics:
            num_images = min(num_images, len(real.pooled))
        if num_images > num_features:
            metrics["sFID"] = distance(generated.spatial, real.spatial, statistics.get("spatial"))
        else:
            logger.warning(
                "sFID is left out: it needs more than %d images, as many as there are spatial features, but got %d.",
                num_features,
                num_images,
            )
    if generated.logits is not None:
        metrics["Inception Score"] = inception_score(generated.logits)[0]
    metrics["KID"] = kernel_distance(generated.pooled, real.pooled)[0]
    metrics["precision"], metrics["recall"] = precision_and_recall(generated.pooled, _random_subset(real.pooled))
    return metrics


def _check_images(
    extractor: FeatureExtractor,
    generated: NpzImages | DatasetImages,
    reference: NpzImages | DatasetImages,
    has_statistics: bool,
    device: torch.device,
) -> list[int]:
    """
    Check sizes and numbers with the first image of each, before features of all images are computed.

    Returns:
        Height and width.

    Raises:
        ValueError: if the sizes differ, or if there are too few images for a covariance.
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
                f"Expected more than {dim} {name} images, as many as the extractor has features, so that their covariance is "
                f"reliable, but got {len(images)}."
            )
    return list(first.shape[:2])


def _features_and_hash(
    extractor: FeatureExtractor, images: NpzImages | DatasetImages, batch_size: int, device: torch.device
) -> tuple[Features, str]:
    """Compute the features, and a hash of the pixels, which does not depend on the file format."""
    digest = hashlib.sha256()

    def batches() -> Iterator[np.ndarray]:
        for batch in images.batches(batch_size):
            digest.update(np.ascontiguousarray(batch).data)
            yield batch

    return extract_features(extractor, read_ahead(batches()), device), digest.hexdigest()


def _random_subset(features: torch.Tensor) -> torch.Tensor:
    """Choose at most `MAX_REFERENCE` rows, always the same; at random, because data sets are often sorted by class."""
    if len(features) <= MAX_REFERENCE:
        return features
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MAX_REFERENCE]]


def _statistics_sha256(statistics: dict[str, GaussianStatistics]) -> str | None:
    """Hash stored statistics; None if there are none."""
    digest = hashlib.sha256()
    for kind, stored in sorted(statistics.items()):
        digest.update(kind.encode())
        for tensor in (stored.mean, stored.covariance):
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest() if statistics else None


def _stored_statistics(reference: str) -> dict[str, GaussianStatistics]:
    """Read the statistics of the whole data set, which ADM's reference batches store beside some of its images."""
    if not reference.endswith(".npz"):
        return {}
    names = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    arrays = read_arrays(reference, *(name for pair in names.values() for name in pair))
    return {
        kind: GaussianStatistics(
            torch.from_numpy(arrays[mean]).double(), torch.from_numpy(arrays[sigma]).double(), None
        )
        for kind, (mean, sigma) in names.items()
        if mean in arrays and sigma in arrays
    }


if __name__ == "__main__":
    run_entry_point(EvaluationArguments, print_metrics)
