"""Images of any size become squares of one size, and tensors."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch

FITS = ("crop", "pad")


def fit_square(image: PIL.Image.Image, size: int, fit: str, background: str) -> PIL.Image.Image:
    """
    Make an image a square of `size` x `size` pixels.

    Args:
        image (`PIL.Image.Image`): Of 8 bits.
        size (`int`): In pixels.
        fit (`str`): `crop` for its centre ([`center_crop`]), `pad` for all of it ([`pad_to_square`]).
        background (`str`): The colour of the padding.
    """
    return center_crop(image, size) if fit == "crop" else pad_to_square(image, size, background)


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """
    Crop the centre square of an image and scale it to `size` x `size` pixels, as ADM does (https://arxiv.org/abs/2105.05233).

    The image is halved with a box filter while it is at least twice too large, then scaled bicubically until its shorter
    side has `size` pixels, then cropped.
    """
    return crop_to_size(image, size, size)[0]


def crop_to_size(image: PIL.Image.Image, height: int, width: int) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """
    Scale an image until it just covers `height` x `width` pixels, and crop its centre.

    It is scaled as in [`center_crop`].

    Returns:
        The image, and how many pixels were cut off at the top and at the left, after scaling.
    """
    image = _scale(image, height, width, max)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height)), (top, left)


def pad_to_square(image: PIL.Image.Image, size: int, background: str) -> PIL.Image.Image:
    """
    Scale an image until its longer side has `size` pixels, and put it in the middle of a square of the background's colour.

    It is scaled as in [`center_crop`].
    """
    image = _scale(image, size, size, min)
    square = PIL.Image.new(image.mode, (size, size), PIL.ImageColor.getcolor(background, image.mode))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def _scale(
    image: PIL.Image.Image, height: int, width: int, choose: Callable[[float, float], float]
) -> PIL.Image.Image:
    """Scale an image until it just covers `height` x `width` pixels (`max`), or just fits into them (`min`)."""

    def factor() -> float:
        return choose(height / image.height, width / image.width)

    while factor() <= 0.5:
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), PIL.Image.Resampling.BOX)
    if factor() != 1:
        shape = (max(round(image.width * factor()), 1), max(round(image.height * factor()), 1))
        image = image.resize(shape, PIL.Image.Resampling.BICUBIC)
    return image


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """8-bit image → float32 tensor (C, H, W) in [-1, 1]."""
    pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= 127.5
    pixels -= 1
    return torch.from_numpy(pixels)
