"""What the comparison trains on and measures by: real images, those held out, and networks that look at them.

Legend: N images, S their size in pixels.
"""

from pathlib import Path

import numpy as np
import PIL.Image

from diffusers_dmp.evaluation.digits import NUM_CLASSES, digit_images, fit_classifier, fit_resnet

TRAIN, HELD_OUT, EXTRACTOR, GUIDE = "train", "held_out", "extractor", "guide"  # the folders of a data set
SEED = 0  # of which images are held out, and where photographs are cropped
GUIDE_SEED = 1  # the network that guides is not the one that measures


def make_digits(folder: Path, num_train: int = 1000) -> None:
    """
    scikit-learn's digits, of which some drawn at random are held out; a classifier of all of them to measure by; and one of those
    that are trained on, to guide by.
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
    RGB crops of S x S pixels of the photographs that come with scikit-learn and scikit-image, at half their resolution, as many
    of each; and a classifier that tells which photograph a crop is of. Held out are other crops, which overlap with the first.
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
    """By name, uint8 (H, W, 3)."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    pictures = {"china": china, "flower": flower, "motorcycle": skimage.data.stereo_motorcycle()[0]}
    pictures |= {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return {name: np.asarray(halved(PIL.Image.fromarray(picture))) for name, picture in pictures.items()}


def halved(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture.resize((picture.width // 2, picture.height // 2), PIL.Image.Resampling.BOX)


def random_crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    top, left = (rng.integers(length - size + 1) for length in picture.shape[:2])
    return picture[top : top + size, left : left + size]


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


def noise_images(num_images: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (N, H, W, C) that show nothing."""
    return np.random.default_rng(SEED).integers(256, size=(num_images, *shape), dtype=np.uint8)


MAKERS = {"digits": make_digits, "photographs": make_photographs}
