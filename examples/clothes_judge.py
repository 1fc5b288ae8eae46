"""The judge of the guidance demo: a classifier of clothes of another kind than the one that guides, and what it says of pictures."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_dmp.evaluation.fashion import CLOTHES, fashion_images
from diffusers_dmp.evaluation.metrics import GaussianStatistics, frechet_distance

NUM_STEPS = 2500
REAL = 1000  # real pictures that are judged as generated ones are


class Judge(nn.Module):
    """A plain convolutional network, without the residual connections and normalisation layers of the one that guides."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 128), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(128, len(CLOTHES))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The features (N, 128) and logits (N, 10) of pictures (N, 1, 28, 28) in [-1, 1]."""
        features = self.convolutions(pixels)
        return features, self.head(features)


def fit_judge(path: Path, images: np.ndarray, labels: np.ndarray, batch_size: int = 64, seed: int = 1) -> Judge:
    """Train a [`Judge`] on pictures uint8 (N, 28, 28) and their mirror images, and save its weights."""
    torch.manual_seed(seed)
    pixels, classes = as_pixels(images), torch.from_numpy(labels.copy())
    judge = Judge().train()
    optimizer = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        batch = torch.randint(len(pixels), (batch_size,))
        mirrored = torch.rand(batch_size, 1, 1, 1) < 0.5
        inputs = torch.where(mirrored, pixels[batch].flip(-1), pixels[batch])
        F.cross_entropy(judge(inputs)[1], classes[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    save_file(judge.state_dict(), path)
    return judge.eval()


def load_judge(path: Path) -> Judge:
    """The judge of a file."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


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


@torch.no_grad()
def in_parts(function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], pixels: torch.Tensor) -> list[torch.Tensor]:
    """What a function returns of many pictures (N, 1, 28, 28)."""
    return [torch.cat(parts) for parts in zip(*(function(part) for part in pixels.split(500)), strict=True)]


def as_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 28, 28) as (N, 1, 28, 28) in [-1, 1]."""
    return torch.from_numpy(images.copy()).float()[:, None] / 127.5 - 1


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
