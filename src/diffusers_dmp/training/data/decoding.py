"""What an image is: one policy from a file to 8-bit pixels, for training, encoding, validation and evaluation.

- It is turned upright as its EXIF orientation says.
- 16-bit grey is scaled to 8 bits by its range. 32-bit integers and floats do not say what white is, and are refused.
- Transparency is composited on a background, unless four channels are asked for.
- Of an animated file it is the first frame.
- Whatever cannot be read is a `ValueError` that names the file and the reason.

Colour profiles are not applied.
"""

import io
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
BACKGROUND = "white"
PROBE_SIZE = (8, 8)  # far below any photo, so that a JPEG is decoded at an eighth of its size
UNREADABLE = "Expected a readable image, but got "  # and then which, and why it cannot be read
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value

# what stands where an image should be, by how it begins
IMPOSTORS = {
    b"version https://git-lfs": "it is a Git LFS pointer; `git lfs pull` downloads the image",
    b"<!doctype html": "it is an HTML page, as failed downloads leave one",
    b"<html": "it is an HTML page, as failed downloads leave one",
}


def open_image(encoded: dict[str, Any] | None, channels: int = 3, background: str = BACKGROUND) -> PIL.Image.Image:
    """
    Decode one entry of a `datasets.Image` column that was loaded with `decode=False`.

    Args:
        encoded (`dict`): `bytes` of an image file, or None, and its `path`.
        channels (`int`): 1 (grey), 3 (RGB) or 4 (RGBA).
        background (`str`): The colour behind transparent pixels, unless there are four channels.

    Returns:
        `PIL.Image.Image`: Upright, of 8 bits, in the mode of `PIL_MODES`.

    Raises:
        ValueError: if it is not an image that can be read; the file is named.
    """
    try:
        with PIL.Image.open(_file(encoded)) as image:
            image.load()
            return to_channels(_upright(image), channels, background)
    except Exception as error:  # Pillow raises many kinds
        raise _unreadable(encoded, error) from error


def probe_image(encoded: dict[str, Any] | None) -> bool:
    """
    Check that [`open_image`] can read an entry, in less time: a JPEG is decoded at an eighth of its size.

    Returns:
        `bool`: Whether it has several frames, of which only the first is read.

    Raises:
        ValueError: as [`open_image`] does.
    """
    try:
        with PIL.Image.open(_file(encoded)) as image:
            image.draft("RGB", PROBE_SIZE)
            image.load()
            _eight_bits(_upright(image))
            # MPO is a photo with others beside it, such as its depth
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception as error:
        raise _unreadable(encoded, error) from error


def to_channels(image: PIL.Image.Image, channels: int, background: str = BACKGROUND) -> PIL.Image.Image:
    """
    Convert an image of any mode to 8 bits and one, three or four channels.

    Args:
        image (`PIL.Image.Image`): The image.
        channels (`int`): 1 (grey), 3 (RGB) or 4 (RGBA).
        background (`str`): The colour behind transparent pixels, unless there are four channels.

    Raises:
        ValueError: if the mode has no known white.
    """
    image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)
    if image.mode not in ("1", "L", "RGBA"):  # palettes, CMYK, YCbCr, LAB, HSV: to others by way of RGB
        image = image.convert("RGB")
    return image.convert(PIL_MODES[channels])


def check_background(background: str) -> None:
    """
    Check that a background is an opaque colour.

    Raises:
        ValueError: if it is not.
    """
    try:
        is_opaque = len(PIL.ImageColor.getrgb(background)) == 3
    except (ValueError, TypeError):  # an unknown name; no name
        is_opaque = False
    if not is_opaque:
        raise ValueError(f"Expected `background` to be a colour such as white or #808080, but got {background!r}.")


def _file(encoded: dict[str, Any] | None) -> "str | io.BytesIO":
    if encoded is None or (encoded["bytes"] is None and not encoded["path"]):
        raise ValueError("the entry is empty")
    return encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    PIL.ImageOps.exif_transpose(image, in_place=True)
    return image


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as it is, or with more than 8 bits per channel scaled by their range."""
    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow has 16 bits as I;16, and some as I: those of PGM, and before Pillow 11.3 those of PNG
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"it has {kind}, which do not say what white is; save it with 8 or 16 bits")
    if "transparency" in image.info:
        raise ValueError("it has 16 bits and a transparent grey; save it with 8 bits, or with an alpha channel")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # 12 in some TIFFs
    grey = np.asarray(image).astype(np.float64) / (2**bits - 1)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts these for 8 bits only
        grey = 1 - grey
    return PIL.Image.fromarray(np.round(grey * 255).astype(np.uint8))


def _unreadable(encoded: dict[str, Any] | None, error: Exception) -> ValueError:
    """The error that names the file and the reason."""
    if encoded is None or (encoded["bytes"] is None and not encoded["path"]):
        return ValueError(f"{UNREADABLE}no image: {error}")
    name = encoded["path"] or f"{len(encoded['bytes'])} bytes without a name"
    return ValueError(f"{UNREADABLE}{name}: {_reason(encoded, error)}")


def _reason(encoded: dict[str, Any], error: Exception) -> str:
    """Why an entry cannot be read."""
    if not isinstance(error, PIL.UnidentifiedImageError):
        return str(error) or type(error).__name__
    file = _file(encoded)
    with open(file, "rb") if isinstance(file, str) else file as opened:
        start = opened.read(64).lstrip().lower()
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp":
        return "it is HEIC or AVIF, which Pillow does not read here; convert it to JPEG or PNG"
    return next((reason for text, reason in IMPOSTORS.items() if start.startswith(text)), "Pillow knows no such image")
