"""Conversion of Patch Diffusion's checkpoints (https://github.com/ericl122333/PatchDiffusion-Pytorch)."""

import math
from typing import Any

import torch

from ..models.patched_unet_2d import PatchedUNet2DModel
from .renaming import check_ndim, group_heads_by_part, load_renamed, pop_supported, split_qkv

_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers": "time_emb_proj",
    "out_layers.2": "conv2",
    "classemb_proj": "class_gate_proj",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}  # and qkv, one matrix in the original
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_embs": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
    "variance_output_t_emb": "variance_time_proj",
    "variance_output_model.0": "variance_out.0",
    "variance_output_model.2": "variance_out.2",
}


def module_names(model: PatchedUNet2DModel) -> dict[str, str]:
    """
    Map the names of a model's modules to the original's.

    Args:
        model ([`PatchedUNet2DModel`]): The model.

    Returns:
        `dict[str, str]`: The original's names by the model's.
    """
    names = {ours: original for original, ours in _TOP.items()}

    def add_layer(ours: str, original_resnet: str, original_attention: str | None) -> None:
        names.update({f"{ours}.resnet.{name}": f"{original_resnet}.{part}" for part, name in _RES_BLOCK.items()})
        if original_attention is not None:
            names.update({f"{ours}.attn.{name}": f"{original_attention}.{part}" for part, name in _ATTENTION.items()})
            names.update({f"{ours}.attn.to_{part}": f"{original_attention}.qkv" for part in "qkv"})

    index = 1
    for number, layer in enumerate(model.down_layers, start=1):
        attention = None if layer.attn is None else f"input_blocks.{index}.1"
        add_layer(f"down_layers.{number - 1}", f"input_blocks.{index}.0", attention)
        index += 1
        level, rest = divmod(number, model.config.layers_per_block)
        if rest == 0 and level <= len(model.downsamplers):
            names[f"downsamplers.{level - 1}.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    add_layer("mid_layers.0", "middle_block.0", "middle_block.1")
    add_layer("mid_layers.1", "middle_block.2", None)
    for index, layer in enumerate(model.up_layers):
        attention = None if layer.attn is None else f"output_blocks.{index}.1"
        add_layer(f"up_layers.{index}", f"output_blocks.{index}.0", attention)
        level, rest = divmod(index + 1, model.config.layers_per_block + 1)
        if rest == 0 and level <= len(model.upsamplers):
            names[f"upsamplers.{level - 1}.conv"] = f"output_blocks.{index}.{1 + (layer.attn is not None)}.conv"
    return names


def build_patched_unet(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> PatchedUNet2DModel:
    """
    Make a new model that Patch Diffusion's weights fit.

    Args:
        weights (`dict[str, torch.Tensor]`): The weights under the original's names; attention matrices may be reordered in
            place.
        config (`dict[str, Any]`): Arguments of the original's constructor, which are removed.

    Returns:
        [`PatchedUNet2DModel`]: The model; [`load_patched_unet`] loads the weights.

    Raises:
        ValueError: if weights or arguments do not fit one another, or are not supported.
    """
    check_ndim(weights, {"input_blocks.0.0.weight": 4, "out.2.weight": 4, "time_embed.0.weight": 2})
    pop_supported(config, {"use_scale_shift_norm": True, "resblock_updown": False, "conv_resample": True, "dims": 2})
    head_dim = config.pop("num_head_channels", 64)
    if not config.pop("use_new_attention_order", True):
        group_heads_by_part(weights, head_dim)

    widths, attention_levels, num_layers = _read_levels(weights)
    model_channels = config.pop("model_channels", weights["time_embed.0.weight"].shape[1])
    in_channels = config.pop("in_channels", 3)
    patch_size = config.pop("patch_size", math.isqrt(len(weights["out.2.weight"]) // in_channels))
    # a super-resolution model's low-resolution channels come after the image's
    low_res_channels = weights["input_blocks.0.0.weight"].shape[1] // patch_size**2 - in_channels
    num_label_rows = len(weights["label_embs.weight"]) if "label_embs.weight" in weights else 0
    classifier_free = config.pop("classifier_free", True)
    num_classes = config.pop("num_classes", num_label_rows - classifier_free if num_label_rows else None)
    if "attention_resolutions" in config:  # by which factors these levels are smaller than the first
        attention_levels = {int(math.log2(factor)) for factor in config.pop("attention_resolutions")}
    learns_variance = "variance_output_t_emb.weight" in weights
    multiple = patch_size * 2 ** (len(widths) - 1)
    return PatchedUNet2DModel(
        sample_size=config.pop("image_size", max(256, multiple)),
        low_res_channels=low_res_channels,
        in_channels=in_channels,
        out_channels=config.pop("out_channels", in_channels * (2 if learns_variance else 1)),
        patch_size=patch_size,
        model_channels=model_channels,
        channel_multipliers=tuple(config.pop("channel_mult", [width / model_channels for width in widths])),
        layers_per_block=config.pop("num_res_blocks", num_layers),
        attention_levels=tuple(sorted(attention_levels)),
        attention_head_dim=head_dim,
        dropout=config.pop("dropout", 0.0),
        num_classes=num_classes,
        class_dropout_prob=0.1 if classifier_free else 0.0,
    )


def _read_levels(weights: dict[str, torch.Tensor]) -> tuple[list[int], set[int], int]:
    """Read the width of each level, the levels with attention, and the layers per level."""
    widths: list[int] = []
    attention_levels: set[int] = set()
    num_layers = 0
    num_blocks = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("input_blocks."))
    for index in range(1, num_blocks):
        if f"input_blocks.{index}.0.op.weight" in weights:
            continue
        width = len(weights[f"input_blocks.{index}.0.out_layers.2.weight"])
        if index == 1 or f"input_blocks.{index - 1}.0.op.weight" in weights:
            widths.append(width)
        num_layers += len(widths) == 1
        if f"input_blocks.{index}.1.qkv.weight" in weights:
            attention_levels.add(len(widths) - 1)
    return widths, attention_levels, num_layers


def load_patched_unet(model: PatchedUNet2DModel, weights: dict[str, torch.Tensor]) -> None:
    """
    Load Patch Diffusion's weights into a model.

    Args:
        model ([`PatchedUNet2DModel`]): What [`build_patched_unet`] made of these weights.
        weights (`dict[str, torch.Tensor]`): The weights under the original's names.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape; it is named.
    """
    load_renamed(model, weights, module_names(model), _translated)


def _translated(name: str, tensor: torch.Tensor, model: PatchedUNet2DModel) -> torch.Tensor:
    """Turn an original tensor into ours. One whose shape does not fit is returned as it is, to be refused by name."""
    expected = model.get_parameter(name).shape
    tensor = split_qkv(name, tensor)
    if tensor.numel() != expected.numel():
        return tensor
    p = model.config.patch_size
    # the channels of a patch: in the original rows, columns, colours; here, as in `pixel_unshuffle`, colours first
    if name == "conv_in.weight":
        return tensor.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2, 4, 5).flatten(1, 3)
    if name.startswith(("conv_out.", "variance_out.2.")):
        return tensor.unflatten(0, (p, p, -1)).movedim(2, 0).flatten(0, 2)
    return tensor.view(expected)  # the original's attention projections are convolutions
