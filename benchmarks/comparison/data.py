"""The data sets of the comparison: real images to train on, others to compare with, and the networks that measure and guide.

Legend: N images.
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from diffusers_dmp.evaluation.digits import fit_resnet
from diffusers_dmp.evaluation.fashion import CLASSES, fashion_images, write_labelled_images
from diffusers_dmp.evaluation.judge import fit_judge
from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.training.data.shards import remember_settings

from .plan import Plan

TRAIN, REFERENCE, EXTRACTOR, GUIDE, JUDGE = "train", "reference", "extractor", "guide", "judge.safetensors"
RECORD = "made.json"  # the settings of what is in a data set's folder
MEASURING = (EXTRACTOR, JUDGE)  # the networks that are stored with the results
EXTRACTORS = "extractors"  # their folder, which all presets share
SEED, GUIDE_SEED, JUDGE_SEED = 0, 1, 2  # a network that guides must not be one that measures
EXTRACTOR_STEPS, GUIDE_STEPS = 2500, 1500
BATCH_SIZE = 128


def make_data(plan: Plan, name: str, results: Path) -> None:
    """
    Make a data set, unless it is there.

    Training the networks that measure does not give the same weights on every machine. So those that are stored beside the
    results are used; if there are none, the new ones are stored there.

    Args:
        plan ([`Plan`]): For the data set's folder and settings.
        name (`str`): The data set's name.
        results (`Path`): The folder of all presets' results.

    Raises:
        ValueError: if the folder contains a data set with other settings, or the data set cannot be had here.
    """
    folder, stored = plan.data_folder(name), results / EXTRACTORS / name
    if not (folder / RECORD).exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        MAKERS[name](folder, stored, **plan.data[name])
    remember_settings(folder / RECORD, plan.data[name], "images")


def make_fashion(folder: Path, stored: Path, num_train: int, num_reference: int) -> None:
    """
    Write Fashion-MNIST's first training images and its first test images, and train the networks.

    Args:
        folder (`Path`): Where to write.
        stored (`Path`): Where the networks that measure are stored.
        num_train, num_reference (`int`): How many images.
    """
    for part, split, number in ((TRAIN, "train", num_train), (REFERENCE, "test", num_reference)):
        images, labels = (each[:number] for each in fashion_images(split))
        write_labelled_images(folder / part / "images.parquet", images, labels)
    images, labels = (each[:num_train] for each in fashion_images())
    fit_resnet(folder / GUIDE, images[..., None], labels, list(CLASSES), GUIDE_STEPS, seed=GUIDE_SEED)
    if not stored.exists():
        with written_whole(stored) as unfinished:
            unfinished.mkdir(parents=True)
            fit_resnet(
                unfinished / EXTRACTOR, images[..., None], labels, list(CLASSES), EXTRACTOR_STEPS, BATCH_SIZE, SEED
            )
            fit_judge(unfinished / JUDGE, images, labels, seed=JUDGE_SEED)
    for name in MEASURING:
        copy = shutil.copytree if (stored / name).is_dir() else shutil.copy
        copy(stored / name, folder / name)


def noise_images(num_images: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return images of uniform noise, uint8 (N, H, W, C); `shape` is (H, W, C)."""
    return np.random.default_rng(SEED).integers(256, size=(num_images, *shape), dtype=np.uint8)


def device() -> torch.device:
    """Where networks compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


MAKERS = {"fashion": make_fashion}
