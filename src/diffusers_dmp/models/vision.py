"""Vision networks of transformers: loading, preprocessing of images, and checksums of weights.

Legend: B batch, C channels, H and W height and width in pixels.
"""

import hashlib
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from ..saving.weight_files import check_saved_folder
from .text_image import has_towers, load_image_tower

# Settings of image processors: a second normalisation, as of EfficientNet, another range, and BGR
_OTHER_STEPS = ("include_top", "rescale_offset", "do_flip_channel_order")


class ImagePreprocessor(nn.Module):
    """
    Resize and normalise images as an image processor does, but differentiably and on tensors.

    Args:
        mean, std (`list[float]`): Mean and standard deviation of each channel of the network's training images, in [0, 1].
        size (`int`, `list[int]` or `None`): The shorter side in pixels, or height and width. None leaves the size as it is.

    Raises:
        ValueError: if `mean` and `std` are not of the same length.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: list[float], std: list[float], size: "int | list[int] | None"):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"Expected `image_mean` and `image_std` to have one length, but got {mean} and {std}.")
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Preprocess images.

        Args:
            images (`torch.Tensor` of shape (B, C, H, W)): Scaled so that clean pixels are in [-1, 1]. Grey images, with C = 1,
                get as many channels as the network has.

        Returns:
            `torch.Tensor` of shape (B, C, H', W').
        """
        height, width = images.shape[-2:]
        size: tuple[int, ...]
        if isinstance(self.size, int):
            scale = self.size / min(height, width)
            size = (round(height * scale), round(width * scale))
        else:
            size = (height, width) if self.size is None else tuple(self.size)
        if size != (height, width):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return ((images + 1) / 2 - self.mean) / self.std


def processor_settings(name_or_path: str, **hub_arguments: Any) -> dict[str, Any]:
    """
    Read the image processor's settings from a transformers model.

    Args:
        name_or_path (`str`): The folder or Hub id of the model.
        hub_arguments: `revision` and those in `HUB_ARGUMENTS`, for the Hub.

    Returns:
        `dict`: `image_mean`, `image_std` and `image_size`, the arguments of [`ImagePreprocessor`].

    Raises:
        ValueError: if the model has no image processor, it computes something else, or its size is given neither as height and
            width nor as the shortest edge.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_arguments)
    except OSError as error:
        raise ValueError(
            f"Expected {name_or_path!r} to have a preprocessor_config.json, or `image_mean`, `image_std` and `image_size` to "
            "be given, but got neither."
        ) from error
    _check_steps(name_or_path, settings)
    normalizes = settings.get("do_normalize", True)
    for name in ("image_mean", "image_std"):
        if normalizes and settings.get(name) is None:
            raise ValueError(
                f"Expected the image processor of {name_or_path!r} to give `{name}`, or `image_mean`, `image_std` and `image_size` "
                "to be given, but got neither."
            )
    return {
        "image_mean": list(settings["image_mean"]) if normalizes else [0.0],
        "image_std": list(settings["image_std"]) if normalizes else [1.0],
        "image_size": _output_size(settings) if settings.get("do_resize", True) else None,
    }


def _check_steps(name_or_path: str, settings: dict[str, Any]) -> None:
    """Refuse an image processor that computes something else than (pixels/255 - mean)/std."""
    others = [name for name in _OTHER_STEPS if settings.get(name)]
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        others.append("rescale_factor")
    if others:
        raise ValueError(
            f"Expected the image processor of {name_or_path!r} to compute (pixels/255 - mean)/std of RGB images, or `image_mean`, "
            f"`image_std` and `image_size` to be given, but got one with {', '.join(others)}."
        )


def _output_size(settings: dict[str, Any]) -> "int | list[int]":
    """The size after cropping: instead of being cropped, the whole image is resized to it."""
    is_cropped = settings.get("do_center_crop")
    size = settings["crop_size"] if is_cropped else settings["size"]
    if isinstance(size, int):
        return [size, size] if is_cropped else size
    if "height" in size and "width" in size:
        return [size["height"], size["width"]]
    if "shortest_edge" in size:
        return size["shortest_edge"]
    raise ValueError(
        f"Expected the image processor's `size` to give `height` and `width` or `shortest_edge`, but got {size}."
    )


def load_network(name_or_path: str, *, with_text: bool = False, **hub_arguments: Any) -> PreTrainedModel:
    """
    Load a transformers model of the class that it was saved as, in float32 and eval mode.

    Args:
        name_or_path (`str`): The folder or Hub id of the model. Of a CLIP or SigLIP, its image tower is loaded: a
            `CLIPVisionModelWithProjection` or `SiglipVisionModel`.
        with_text (`bool`): Load all of a CLIP or SigLIP.
        hub_arguments: `revision` and those in `HUB_ARGUMENTS`, for the Hub.

    Raises:
        ValueError: if transformers has no such class, it takes no images as a whole, or a file of a local folder is damaged; it
            is named.
    """
    check_saved_folder(name_or_path, components=False)
    config = AutoConfig.from_pretrained(name_or_path, **hub_arguments)
    if config.model_type.startswith("siglip2"):
        raise ValueError(
            f"Expected {name_or_path!r} to be a network of images as a whole, but got a SigLIP 2 of patches of any number (NaFlex); "
            "those of a fixed size, such as google/siglip2-base-patch16-224, are loaded."
        )
    if has_towers(config) and not with_text:
        return load_image_tower(name_or_path, config, **hub_arguments)
    network_class = getattr(transformers, (config.architectures or ["none"])[0], None)
    if network_class is None:
        raise ValueError(
            f"Expected {name_or_path!r} to be a model of a class of transformers, but got the architectures "
            f"{config.architectures}."
        )
    return network_class.from_pretrained(name_or_path, dtype=torch.float32, **hub_arguments).eval()


def network_sha256(network: nn.Module, settings: "dict[str, Any] | None" = None) -> str:
    """
    Compute a checksum of a network's weights and buffers.

    Args:
        network (`nn.Module`): The network.
        settings (`dict`, *optional*): Settings that are part of the checksum as well, as JSON.

    Returns:
        `str`: The SHA-256 digest, in hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() if settings else b"")
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
