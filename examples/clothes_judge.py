"""What the judge of the guidance demo says of pictures: a classifier of clothes of another kind than the one that guides."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from diffusers_dmp.evaluation.fashion import fashion_images
from diffusers_dmp.evaluation.judge import Judge, as_pixels, in_parts
from diffusers_dmp.evaluation.metrics import GaussianStatistics, frechet_distance

REAL = 1000  # real pictures that are judged as generated ones are


class Judging:
    """
    What the judge says of pictures, in comparison with real ones that it has not seen.

    Args:
        judge ([`Judge`]): Trained.
        seen_by_guide (`Callable`): The classes (N,) that the classifier that guides sees in clean pixels (N, 1, 28, 28).
    """

    def __init__(self, judge: Judge, seen_by_guide: Callable[[torch.Tensor], torch.Tensor]):
        self.judge, self.seen_by_guide = judge, seen_by_guide
        images, labels = fashion_images("test")
        self.judged_images, self.judged_labels = images[:REAL], labels[:REAL]
        pixels = as_pixels(images[REAL:])
        features, logits = in_parts(judge, pixels)
        self.real_statistics = GaussianStatistics.of(features)
        self.real_spread = spread(pixels, logits.argmax(1))

    def of(self, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """
        Figures of pictures.

        Args:
            images (`np.ndarray` of shape (N, 28, 28)): uint8.
            labels (`np.ndarray` of shape (N,)): The classes that were asked for.

        Returns:
            `dict`: The share `recognised` as asked by the judge, its 95 % `interval`, and the share `recognised_by_guide`; the
            judge's mean `confidence`; the Fréchet `distance` of its features to those of real pictures; and the `spread` of the
            pictures of a class, as a multiple of that of real ones.
        """
        pixels, asked = as_pixels(images), torch.from_numpy(labels)
        features, logits = in_parts(self.judge, pixels)
        seen = logits.argmax(1)
        return {
            "recognised": share(seen == asked),
            "interval": wilson_interval(int((seen == asked).sum()), len(asked)),
            "recognised_by_guide": share(self.seen_by_guide(pixels) == asked),
            "confidence": round(float(logits.softmax(1).max(1).values.mean()), 4),
            "distance": round(frechet_distance(GaussianStatistics.of(features), self.real_statistics), 2),
            "spread": round(spread(pixels, seen) / self.real_spread, 4),
        }

    def of_real_pictures(self) -> dict[str, Any]:
        """The same of real pictures, which are not among those that they are compared with."""
        return self.of(self.judged_images, self.judged_labels)


def share(hits: torch.Tensor) -> float:
    """The share of what is true."""
    return round(float(hits.double().mean()), 4)


def wilson_interval(hits: int, count: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson, https://doi.org/10.1080/01621459.1927.10502953)."""
    centre, width = hits + z**2 / 2, z * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    return [round((centre + sign * width) / (count + z**2), 4) for sign in (-1, 1)]


def spread(pixels: torch.Tensor, classes: torch.Tensor) -> float:
    """The standard deviation of a pixel among pictures of one class, averaged over pixels and classes."""
    return float(torch.stack([pixels[classes == each].std(0).mean() for each in classes.unique()]).nanmean())
