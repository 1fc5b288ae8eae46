"""The photograph and the map of classes that `diffusers-dmp guide` can ask for, as targets in the size of a network's output.

Legend: B batch, K classes, h and w height and width of a map.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from ..guidance import DepthTarget, GuidanceExperts, SegmentationTarget

    Size = tuple[int, int]

FREE = 255  # a pixel of a map that may be anything


def depth_target(path: Path, vision: "GuidanceExperts", size: "Size | None", blank: Any) -> "DepthTarget":
    """
    Ask for the depth that the network itself sees in a photograph.

    Args:
        path (`Path`): The photograph. Its centre with the proportions of the images is used.
        vision ([`GuidanceExperts`]): The network.
        size (`tuple[int, int]`, *optional*): Height and width of the images that it will see; they are square if it is not known.
        blank (`ModelOutput`, *optional*): Its output for an image of this size.

    Raises:
        ValueError: if the network does not estimate depth, or neither it nor the images have a known size.
    """
    import torch

    from ..guidance import DepthTarget
    from ..training.data.fitting import crop_to_size, to_tensor

    _expect_size("--depth", vision, size)
    if "predicted_depth" not in blank:
        raise ValueError(
            f"Expected a network that estimates depth for `--depth`, but got a {vision.config.base_model_class}."
        )
    photograph = read_photograph(path)
    if _is_size_fixed(vision) or size is None:  # the network resizes it
        size = _largest_crop(photograph, size or (1, 1))
    photograph, _ = crop_to_size(photograph, *size)
    with torch.no_grad():
        output = vision(to_tensor(photograph)[None], torch.tensor(0))
    return DepthTarget(output.predicted_depth)


def segmentation_target(
    path: Path, vision: "GuidanceExperts", size: "Size | None", blank: Any
) -> "SegmentationTarget":
    """
    Ask for a map of classes, resized to the network's logits.

    Args:
        path, vision, size, blank: See [`depth_target`] and [`read_class_map`].

    Raises:
        ValueError: if the network is none of segmentation, or neither it nor the images have a known size.
    """
    import numpy as np
    import torch
    from PIL import Image

    from ..guidance import SegmentationTarget

    _expect_size("--segmentation", vision, size)
    logits = blank.get("logits")
    if logits is None or logits.ndim != 4:  # (B, K, h, w)
        raise ValueError(
            f"Expected a network of segmentation for `--segmentation`, but got a {vision.config.base_model_class}."
        )
    height, width = logits.shape[2:]
    classes = np.array(read_class_map(path).resize((width, height), Image.Resampling.NEAREST))
    return SegmentationTarget(torch.from_numpy(classes).long(), ignore_index=FREE)


def read_photograph(path: Path) -> "Image.Image":
    """Read an image in RGB, upright."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_class_map(path: Path) -> "Image.Image":
    """
    Read an image whose pixels are class indices: of one channel, or with a palette.

    Raises:
        ValueError: if it has several channels.
    """
    from PIL import Image

    with Image.open(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(
                f"Expected `--segmentation` to be an image of one channel with the index of a class in each pixel ({FREE}: any), "
                f"but got {str(path)!r} in the mode {image.mode}."
            )
        image.load()
        return image


def _largest_crop(image: "Image.Image", size: "Size") -> "Size":
    """Height and width of the largest part of an image with the proportions of `size`."""
    height, width = size
    scale = min(image.height / height, image.width / width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _is_size_fixed(vision: "GuidanceExperts") -> bool:
    """Whether the network sees images of any size in one of its own."""
    return isinstance(vision.config.image_size, (list, tuple))


def _expect_size(option: str, vision: "GuidanceExperts", size: "Size | None") -> None:
    """Refuse an option whose map has the size of the images, where neither they nor the network have a known one."""
    if size is None and not _is_size_fixed(vision):
        raise ValueError(
            f"Expected `--height` and `--width` with `{option}`, as this network has no size of its own, but got none."
        )
