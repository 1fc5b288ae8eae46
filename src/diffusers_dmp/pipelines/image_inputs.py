"""The tensors that a generation starts from: the initial noise, and the image that a super-resolution model enlarges.

Legend: B batch, N images to enlarge, C channels, H and W height and width, in pixels or latent pixels.
"""

from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor

from .settings import GenerationSettings

RANGE_TOLERANCE = 1e-3  # how far rounding may lift a pixel value above 1


def prepare_latents(
    settings: GenerationSettings, batch_size: int, denoiser: ModelMixin, vae_scale_factor: int, device: torch.device
) -> torch.Tensor:
    """
    Sample the initial noise, or check the one that is given.

    Args:
        settings ([`GenerationSettings`]): `height`, `width` (in pixels), `generator` and `latents` are used.
        batch_size (`int`): B.
        denoiser ([`ModelMixin`]): The model, whose configuration has channels and trained size.
        vae_scale_factor (`int`): Pixels per latent pixel.
        device (`torch.device`): The device of the result.

    Returns:
        `torch.Tensor` of shape (B, C, H, W), of unit variance, in the denoiser's dtype.

    Raises:
        ValueError: if the size is not divisible by what VAE and model need, or `generator` or `latents` do not fit.
    """
    config, generator, latents = denoiser.config, settings.generator, settings.latents
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"Expected `generator` to be one or a list of {batch_size}, but got {len(generator)}.")
    trained = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
    sizes = [
        own * vae_scale_factor if asked is None else asked
        for own, asked in zip(trained, (settings.height, settings.width), strict=True)
    ]
    multiple = vae_scale_factor * config.get("patch_size", 1)
    if any(size < multiple or size % multiple for size in sizes):
        raise ValueError(
            f"Expected `height` and `width` to be divisible by {multiple}, but got {sizes[0]} x {sizes[1]}."
        )
    shape = (batch_size, config.in_channels, *(size // vae_scale_factor for size in sizes))
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=denoiser.dtype)
    if not isinstance(latents, torch.Tensor) or latents.shape != shape:
        got = tuple(latents.shape) if hasattr(latents, "shape") else latents
        raise ValueError(
            f"Expected `latents` to be a tensor of shape {shape}, but got a {type(latents).__name__} of {got}."
        )
    return latents.to(device, denoiser.dtype)


def prepare_low_res(image: PipelineImageInput | None, denoisers: list[ModelMixin]) -> list[torch.Tensor | None]:
    """
    Turn the images to enlarge into what each super-resolution denoiser is called with as `low_res`.

    A denoiser is a super-resolution model if `low_res_channels` in its configuration is greater than 0.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them): The images, all of one size.
        denoisers (`list[ModelMixin]`): The pipeline's denoisers.

    Returns:
        For each denoiser, None or a `torch.Tensor` of shape (N, low_res_channels, h, w), in [-1, 1] and the images'
        own size, on the CPU or the images' device.

    Raises:
        ValueError: if `image` is missing, or no denoiser takes one, or the images do not fit.
    """
    channels = [denoiser.config.get("low_res_channels") or 0 for denoiser in denoisers]
    if image is None:
        if any(channels):
            raise ValueError(
                f"Expected an `image` to enlarge for a model of {max(channels)} `low_res_channels`, but got None."
            )
        return [None] * len(denoisers)
    if not any(channels):
        raise ValueError("Expected no `image` for a model without `low_res_channels`, but got one.")
    return [_low_res_images(image, count) if count else None for count in channels]


def _low_res_images(image: PipelineImageInput, channels: int) -> torch.Tensor:
    """Images (N, channels, h, w) in [-1, 1]."""
    images = list(image) if isinstance(image, (list, tuple)) else image
    if isinstance(images, list):
        sizes = sorted({_size_of(each) for each in images})
        if len(sizes) != 1:
            raise ValueError(f"Expected `image` to be one or more images of one size, but got the sizes {sizes}.")
    # in their own size: the model enlarges them itself
    processor = VaeImageProcessor(
        do_resize=False, vae_latent_channels=0, do_convert_rgb=channels == 3, do_convert_grayscale=channels == 1
    )
    tensor = processor.preprocess(images).float()
    if tensor.ndim != 4 or tensor.shape[1] != channels:
        raise ValueError(
            f"Expected `image` to have the {channels} channels of `low_res_channels`, "
            f"but got images of the shape {tuple(tensor.shape[1:])}."
        )
    if not tensor.abs().max() <= 1 + RANGE_TOLERANCE:
        raise ValueError("Expected `image` to have values in [0, 1], or in [-1, 1], but got values beyond.")
    return tensor


def _size_of(image: Any) -> tuple[int, ...]:
    if isinstance(image, PIL.Image.Image):
        return image.size
    return tuple(getattr(image, "shape", ()))
