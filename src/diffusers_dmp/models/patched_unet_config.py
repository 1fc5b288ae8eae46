"""Checks of the configuration of Patch Diffusion's UNet.
https://arxiv.org/abs/2207.04316
"""

from collections.abc import Mapping
from typing import Any

from ..diffusion.predictions import PREDICTION_TYPES
from .configuration import check_positive
from .patched_unet_layers import NORM_GROUPS

_POSITIVE_SIZES = (
    "sample_size", "in_channels", "patch_size", "model_channels", "layers_per_block", "attention_head_dim",
    "num_train_timesteps",
)  # fmt: skip


def check_patched_unet_config(config: Mapping[str, Any], widths: list[int]) -> None:
    """
    Check the configuration of a [`PatchedUNet2DModel`].

    Args:
        config (`Mapping[str, Any]`): The arguments of the model.
        widths (`list[int]`): The width of each level, the finest first.

    Raises:
        ValueError: as [`PatchedUNet2DModel`] does.
    """
    check_positive(config, _POSITIVE_SIZES)
    in_channels, out_channels = config["in_channels"], config["out_channels"]
    if out_channels not in (None, in_channels, 2 * in_channels):
        raise ValueError(
            f"Expected `out_channels` to be `in_channels`, {in_channels}, or twice as many for a learned variance, but "
            f"got {out_channels}."
        )
    multiple = config["patch_size"] * 2 ** (len(widths) - 1)
    if config["sample_size"] % multiple:
        raise ValueError(
            f"Expected `sample_size` to be divisible by {multiple}, `patch_size` times downsampling, "
            f"but got {config['sample_size']}."
        )
    if config["prediction_type"] not in PREDICTION_TYPES:
        raise ValueError(
            f"Expected `prediction_type` to be one of {', '.join(PREDICTION_TYPES)}, but got {config['prediction_type']!r}."
        )
    _check_widths(config, widths)


def _check_widths(config: Mapping[str, Any], widths: list[int]) -> None:
    for multiplier, width in zip(config["channel_multipliers"], widths):
        if width % NORM_GROUPS or width == 0:
            raise ValueError(
                f"Expected `channel_multipliers` to give multiples of {NORM_GROUPS} channels, but got {multiplier} x "
                f"{config['model_channels']}."
            )
    head_dim = config["attention_head_dim"]
    for level in {*config["attention_levels"], len(widths) - 1}:  # the middle, at the last level, has attention, too
        if not 0 <= level < len(widths):
            raise ValueError(f"Expected `attention_levels` to be in [0, {len(widths)}), but got {level}.")
        if widths[level] % head_dim:
            raise ValueError(
                f"Expected `attention_head_dim` to divide the {widths[level]} channels of level {level}, but got {head_dim}."
            )
