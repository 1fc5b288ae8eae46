"""The data of the demo: scikit-learn's 1,797 scanned handwritten digits, 8 x 8 pixels, real and always at hand.
https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits
"""

import os
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

NUM_CLASSES = 10
NUM_IMAGES = 1797
# The last sixth is held out where a validation loss is wanted. It is one stretch because neighbouring scans are often of one
# writer, who would otherwise be in both parts.
TRAINING_IMAGES, VALIDATION_IMAGES = range(1500), range(1500, NUM_IMAGES)


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The scans as uint8 (1797, 8, 8), and their classes as int (1797,)."""
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target  # 17 grey levels


def write_image_folder(folder: "str | os.PathLike", indices: range = range(NUM_IMAGES)) -> Path:
    """Write the scans, or those of some `indices`, as PNG files, one sub-folder per class."""
    images, labels = digit_images()
    for index in indices:
        image, label = images[index], labels[index]
        path = Path(folder, str(label), f"{index:04d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    return Path(folder)


def fit_reader() -> Pipeline:
    """A logistic regression on the real digits, which takes pixels in [0, 1] as (N, 64)."""
    images, labels = digit_images()
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return reader.fit(images.reshape(len(images), -1) / 255, labels)
