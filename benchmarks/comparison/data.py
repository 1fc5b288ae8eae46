"""The data sets of the comparison: real images to train on, held-out images, and the networks that measure and guide.

Legend: N images, S their height and width in pixels.
"""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image

from diffusers_dmp.evaluation.digits import NUM_CLASSES, digit_images, fit_classifier, fit_resnet
from diffusers_dmp.training.data.shards import remember_settings

from .plan import Plan

TRAIN, HELD_OUT, EXTRACTOR, GUIDE = "train", "held_out", "extractor", "guide"  # the folders of a data set
RECORD = "made.json"  # the settings of what is in a data set's folder
EXTRACTORS = "extractors"  # the folder of the feature extractors in the results
SEED = 0  # of the choice of held-out images and of the crops of photographs
GUIDE_SEED = 1  # of the network that guides, which must not be the one that measures


def make_data(plan: Plan, name: str, results: Path) -> None:
    """
    Make a data set, unless it is there.

    Training its feature extractor does not give the same weights on every machine. So the extractor that is stored in the
    results is used; if there is none, the new one is stored there.

    Args:
        plan ([`Plan`]): For the data set's folder and settings.
        name (`str`): The data set's name.
        results (`Path`): The folder of the plan's results.

    Raises:
        ValueError: if the folder contains a data set with other settings.
    """
    folder, stored = plan.data_folder(name), results / EXTRACTORS / name
    if not (folder / RECORD).exists():
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        MAKERS[name](folder, **plan.data[name])
        if stored.exists():
            shutil.rmtree(folder / EXTRACTOR)
            shutil.copytree(stored, folder / EXTRACTOR)
    remember_settings(folder / RECORD, plan.data[name], "images")
    if not stored.exists():
        shutil.copytree(folder / EXTRACTOR, stored)


def make_digits(folder: Path, num_train: int = 1000) -> None:
    """
    Write scikit-learn's digits, of which a random part is held out, and train the networks.

    The network that measures is trained on all digits; the one that guides, on those that are trained on.
    """
    images, labels = digit_images()
    order = np.random.default_rng(SEED).permutation(len(images))
    for part, indices in ((TRAIN, order[:num_train]), (HELD_OUT, order[num_train:])):
        for index in indices:
            save_image(folder / part / str(labels[index]) / f"{index:04d}.png", images[index])
    names = [str(label) for label in range(NUM_CLASSES)]
    own = order[:num_train]
    fit_classifier(folder / EXTRACTOR)
    fit_resnet(folder / GUIDE, images[own, ..., None], labels[own], names, seed=GUIDE_SEED)


def make_photographs(folder: Path, size: int = 32, num_train: int = 4000, num_held_out: int = 1000) -> None:
    """
    Write random RGB crops of photographs, and train a network that tells which photograph a crop is of.

    The photographs come with scikit-learn and scikit-image; they are used at half their resolution, and equally often. The
    held-out images are other crops, which overlap with the first.

    Args:
        folder (`Path`): Where to write.
        size (`int`): S.
        num_train, num_held_out (`int`): How many crops.
    """
    rng = np.random.default_rng(SEED)
    pictures = photographs()
    crops, labels = [], []
    for index in range(num_train + num_held_out):
        label = index % len(pictures)
        crop = random_crop(list(pictures.values())[label], size, rng)
        crops.append(crop)
        labels.append(label)
        save_image(folder / (TRAIN if index < num_train else HELD_OUT) / f"{index:05d}.png", crop)
    fit_resnet(folder / EXTRACTOR, np.stack(crops), np.array(labels), list(pictures))


def photographs() -> dict[str, np.ndarray]:
    """Return the photographs by name, as uint8 (H, W, 3)."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    pictures = {"china": china, "flower": flower, "motorcycle": skimage.data.stereo_motorcycle()[0]}
    pictures |= {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return {name: np.asarray(halved(PIL.Image.fromarray(picture))) for name, picture in pictures.items()}


def halved(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Halve height and width."""
    return picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)


def random_crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop S x S pixels at a random position."""
    top, left = (rng.integers(length - size + 1) for length in picture.shape[:2])
    return picture[top : top + size, left : left + size]


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write an image, and make its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def noise_images(num_images: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Return images of uniform noise, uint8 (N, H, W, C); `shape` is (H, W, C)."""
    return np.random.default_rng(SEED).integers(256, size=(num_images, *shape), dtype=np.uint8)


MAKERS = {"digits": make_digits, "photographs": make_photographs}
