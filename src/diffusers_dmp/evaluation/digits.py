"""The data of the demo: scikit-learn's 1,797 scanned handwritten digits of 8 x 8 pixels, and classifiers of them.
https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
"""

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import ResNetConfig, ResNetForImageClassification

from ..models.vision import ImagePreprocessor

NUM_CLASSES = 10
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PHRASES = ("a handwritten {}", "the digit {}", "{} written by hand", "a scan of a handwritten {}")
ENLARGED_SIZE = 28  # pixels, as Fashion-MNIST has
CLASSIFIER_SIZE = 32  # pixels to which smaller images are enlarged, because a ResNet reduces the resolution at once
NUM_IMAGES = 1797
# The last sixth is held out for validation losses. It is contiguous because neighbouring scans are often by the same writer, who
# would otherwise be in both parts.
TRAINING_IMAGES, VALIDATION_IMAGES = range(1500), range(1500, NUM_IMAGES)


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans as uint8 (1797, 8, 8), and their classes as int (1797,)."""
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target  # 17 grey levels


def enlarged_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans in the size of Fashion-MNIST's pictures, uint8 (1797, 28, 28), and their classes as int (1797,)."""
    images, labels = digit_images()
    size = (ENLARGED_SIZE, ENLARGED_SIZE)
    enlarged = [PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in enlarged]), labels


def write_image_folder(folder: "str | os.PathLike", indices: range = range(NUM_IMAGES)) -> Path:
    """
    Write scans as PNG files, one sub-folder per class.

    Args:
        folder: Where to write them.
        indices (`range`): Which of the scans; all by default.

    Returns:
        The folder.
    """
    images, labels = digit_images()
    for index in indices:
        image, label = images[index], labels[index]
        path = Path(folder, str(label), f"{index:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return Path(folder)


def fit_reader(pixels: np.ndarray | None = None, labels: np.ndarray | None = None) -> Pipeline:
    """
    Fit a logistic regression that recognises digits.

    Args:
        pixels (`np.ndarray` of shape (N, 64), *optional*): In [0, 1]; by default all real digits.
        labels (`np.ndarray` of shape (N,), *optional*): Their classes.
    """
    if pixels is None:
        images, labels = digit_images()
        pixels = images.reshape(len(images), -1) / 255
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(pixels, labels)


def fit_classifier(
    folder: "str | os.PathLike", num_steps: int = 600, batch_size: int = 64, seed: int = 0
) -> ResNetForImageClassification:
    """Train the classifier of [`fit_resnet`] on the real digits."""
    images, labels = digit_images()
    names = [str(label) for label in range(NUM_CLASSES)]
    return fit_resnet(folder, images[..., None], labels, names, num_steps, batch_size, seed)


def fit_resnet(
    folder: "str | os.PathLike",
    images: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    num_steps: int = 600,
    batch_size: int = 64,
    seed: int = 0,
) -> ResNetForImageClassification:
    """
    Train a small ResNet of transformers with 64 features on clean images, and save it with its image processor's settings.

    Guidance calls this an off-the-shelf model: it has not been trained on noisy images.

    Args:
        folder: Where to save it.
        images (`np.ndarray` of shape (N, H, W, C)): uint8; enlarged to 32 pixels if they are smaller.
        labels (`np.ndarray` of shape (N,)): Their classes.
        names (`list[str]`): The names of the classes.
        num_steps (`int`): Optimizer steps.
        batch_size (`int`): Images per step.
        seed (`int`): Of the weights and the batches.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    pixels = torch.tensor(images).float().permute(0, 3, 1, 2) / 127.5 - 1  # (N, C, H, W)
    classes = torch.tensor(labels).long()
    channels, size = pixels.shape[1], max(pixels.shape[2], CLASSIFIER_SIZE)
    config = ResNetConfig(
        num_channels=channels,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    network = ResNetForImageClassification(config).train()
    preprocess = ImagePreprocessor([0.5] * channels, [0.5] * channels, [size] * 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=num_steps)
    for _ in range(num_steps):
        batch = torch.randint(len(pixels), (batch_size,))
        network(preprocess(pixels[batch]), labels=classes[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    network.eval().save_pretrained(folder)
    settings = {
        "size": {"height": size, "width": size},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    Path(folder, "preprocessor_config.json").write_text(json.dumps(settings) + "\n")
    return network
