"""The data sets of the comparison: real images to train on, others to compare with, and the networks that measure and guide.

Legend: N images.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from diffusers_dmp.evaluation.digits import DIGIT_PHRASES, DIGITS, enlarged_digits, fit_resnet
from diffusers_dmp.evaluation.fashion import (
    CLASSES,
    captions_of,
    fashion_images,
    write_captioned_images,
    write_labelled_images,
)
from diffusers_dmp.evaluation.judge import fit_judge
from diffusers_dmp.evaluation.text_model import new_pipeline
from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts
from diffusers_dmp.training.data.shards import remember_settings

from .plan import Plan

TRAIN, REFERENCE, EXTRACTOR, GUIDE, JUDGE = "train", "reference", "extractor", "guide", "judge.safetensors"
RECORD = "made.json"  # the settings of what is in a data set's folder
MEASURING = (EXTRACTOR, JUDGE)  # the networks that are stored with the results
EXTRACTORS = "extractors"  # their folder, which all presets share
SEED, GUIDE_SEED, JUDGE_SEED = 0, 1, 2  # a network that guides must not be one that measures
EXTRACTOR_STEPS, GUIDE_STEPS = 2500, 1500
# of a text-to-image model: the pipeline that its training begins with, encoded pictures and captions, and prompts to sample from
START, CLOTHES, CAPTIONED, PROMPTS = "start", "clothes", "captioned", "prompts.txt"
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
    _measuring_networks(folder, stored, images, labels, CLASSES)


def make_digits(
    folder: Path, stored: Path, num_train: int, num_reference: int, num_clothes: int, patch_size: int
) -> None:
    """
    Write what a text-to-image model of Fashion-MNIST is trained on, and the digits that it is adapted to.

    These are: a pipeline with random weights; Fashion-MNIST and the first scans of scikit-learn's digits, with captions, encoded by
    that pipeline; prompts to sample from, in the order of the classes; and the last scans to compare with, which are by other
    writers, and the networks.

    Args:
        folder, stored (`Path`): As of [`make_fashion`].
        num_train, num_reference, num_clothes (`int`): How many images.
        patch_size (`int`): Of the transformer.
    """
    new_pipeline(patch_size=patch_size).save_pretrained(folder / START)
    clothes, kinds = (each[:num_clothes] for each in fashion_images())
    digits, labels = enlarged_digits()
    train, reference = slice(num_train), slice(len(digits) - num_reference, None)
    for part, rows in ((TRAIN, train), (REFERENCE, reference)):
        write_labelled_images(folder / part / "images.parquet", digits[rows], labels[rows], DIGITS)
    _encode(folder, CLOTHES, clothes, captions_of(kinds))
    _encode(folder, CAPTIONED, digits[train], captions_of(labels[train], DIGITS, DIGIT_PHRASES))
    (folder / PROMPTS).write_text("".join(f"{DIGIT_PHRASES[0].format(name)}\n" for name in DIGITS))
    _measuring_networks(folder, stored, digits[train], labels[train], DIGITS, mirror=False)


def _encode(folder: Path, name: str, images: np.ndarray, captions: list[str]) -> None:
    """Encode images and captions by the pipeline in a data set's folder."""
    plain = folder / "plain" / name
    write_captioned_images(plain / "images.parquet", images, captions)
    encode_prompts(
        PromptEncodingArguments(
            dataset=str(plain),
            pipeline=str(folder / START),
            output_dir=str(folder / name),
            resolution=images.shape[1],
            batch_size=64,
            shard_size=4096,
        )
    )


def _measuring_networks(
    folder: Path, stored: Path, images: np.ndarray, labels: np.ndarray, names: Sequence[str], mirror: bool = True
) -> None:
    """Copy the networks that measure into a data set's folder; if none are stored, train and store them before."""
    if not stored.exists():
        with written_whole(stored) as unfinished:
            unfinished.mkdir(parents=True)
            fit_resnet(
                unfinished / EXTRACTOR, images[..., None], labels, list(names), EXTRACTOR_STEPS, BATCH_SIZE, SEED
            )
            fit_judge(unfinished / JUDGE, images, labels, seed=JUDGE_SEED, mirror=mirror)
    for name in MEASURING:
        copy = shutil.copytree if (stored / name).is_dir() else shutil.copy
        copy(stored / name, folder / name)


def noise_images(num_images: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return images of uniform noise, uint8 (N, H, W, C); `shape` is (H, W, C)."""
    return np.random.default_rng(SEED).integers(256, size=(num_images, *shape), dtype=np.uint8)


def device() -> torch.device:
    """Where networks compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


MAKERS = {"fashion": make_fashion, "digits": make_digits}
