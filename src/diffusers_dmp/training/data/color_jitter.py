"""Random brightness, contrast and saturation, as torchvision's `ColorJitter` has them, by factors that are given.

Legend: b images, C channels, H and W height and width.
"""

import torch

NUM_FACTORS = 3  # brightness, contrast, saturation, applied in this order
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts to grey


def jitter_factors(uniform: torch.Tensor, strength: float) -> torch.Tensor:
    """Uniform random numbers in [0, 1) -> factors in [1 - strength, 1 + strength)."""
    return 1 + strength * (2 * uniform - 1)


def jitter_colors(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    Change the colours of images, each by factors of its own.

    Args:
        images (`torch.Tensor` of shape (b, C, H, W)): In [-1, 1]; grey, RGB or RGBA. Alpha stays as it is.
        factors (`torch.Tensor` of shape (b, 3)): Of brightness, contrast and saturation; 1 changes nothing.

    Returns:
        `torch.Tensor` of shape (b, C, H, W): In [-1, 1].
    """
    brightness, contrast, saturation = factors.to(images.dtype)[:, :, None, None, None].unbind(1)
    colors = ((images[:, :3] + 1) / 2 * brightness).clamp(0, 1)
    mean = _grey(colors).mean((1, 2, 3), keepdim=True)
    colors = (mean + contrast * (colors - mean)).clamp(0, 1)
    grey = _grey(colors)
    colors = (grey + saturation * (colors - grey)).clamp(0, 1)
    return torch.cat([colors * 2 - 1, images[:, 3:]], dim=1)


def _grey(colors: torch.Tensor) -> torch.Tensor:
    """(b, C, H, W) -> (b, 1, H, W)."""
    if colors.shape[1] == 1:
        return colors
    red, green, blue = (weight * channel for weight, channel in zip(LUMA, colors.split(1, dim=1)))
    return red + green + blue
