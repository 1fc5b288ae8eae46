"""A classifier of Fashion-MNIST, or of other pictures of its size, that judges generated ones. It is of another kind than those that
guide or measure: a plain convolutional network.

Legend: N pictures.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .fashion import CLOTHES

NUM_STEPS = 2500


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


def fit_judge(
    path: Path, images: np.ndarray, labels: np.ndarray, batch_size: int = 64, seed: int = 1, mirror: bool = True
) -> Judge:
    """Train a [`Judge`] on pictures uint8 (N, 28, 28), and with `mirror` their mirror images, and save its weights."""
    torch.manual_seed(seed)
    pixels, classes = as_pixels(images), torch.from_numpy(labels.copy())
    judge = Judge().train()
    optimizer = torch.optim.Adam(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        batch = torch.randint(len(pixels), (batch_size,))
        inputs = pixels[batch]
        if mirror:
            inputs = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, inputs.flip(-1), inputs)
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


@torch.no_grad()
def in_parts(function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], pixels: torch.Tensor) -> list[torch.Tensor]:
    """What a function returns of many pictures (N, 1, 28, 28)."""
    return [torch.cat(parts) for parts in zip(*(function(part) for part in pixels.split(500)), strict=True)]


def share_recognised(
    network: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], images: np.ndarray, labels: np.ndarray
) -> float:
    """
    The share of pictures whose class a classifier recognises, to four places.

    Args:
        network (`Callable`): A [`Judge`], or what else returns logits (N, K) last, of pixels (N, 1, 28, 28) in [-1, 1].
        images (`np.ndarray` of shape (N, 28, 28)): uint8.
        labels (`np.ndarray` of shape (N,)): The classes that are right, or that were asked for.
    """
    *_, logits = in_parts(network, as_pixels(images))
    return round(float((logits.argmax(1).numpy() == labels).mean()), 4)


def as_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 28, 28) as (N, 1, 28, 28) in [-1, 1]."""
    return torch.from_numpy(images.copy()).float()[:, None] / 127.5 - 1
