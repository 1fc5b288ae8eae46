"""Conversion of ADM's UNets (https://github.com/openai/guided-diffusion) to Diffusers' `UNet2DModel`.

These are the published models for ImageNet at 64 to 256 pixels and for LSUN, conditional or not. Their residual blocks also
do the down- and upsampling, and are scaled and shifted by the timestep.
"""

from typing import Any

import torch
from diffusers import UNet2DModel

from .renaming import check_ndim, group_heads_by_part, load_renamed, pop_supported, split_qkv

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}  # and qkv, one matrix in the original
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def build_adm_unet(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> UNet2DModel:
    """
    Make a new model that ADM's weights fit.

    Args:
        weights (`dict[str, torch.Tensor]`): The weights under the original's names; attention matrices may be reordered in
            place.
        config (`dict[str, Any]`): Arguments of the original's constructor, which are removed.

    Returns:
        [`UNet2DModel`]: The model; [`load_adm_unet`] loads the weights.

    Raises:
        ValueError: if weights or arguments do not fit one another, or are not supported.
    """
    check_ndim(weights, {"input_blocks.0.0.weight": 4, "out.2.weight": 4, "time_embed.0.weight": 2})
    pop_supported(config, {"use_scale_shift_norm": True, "resblock_updown": True, "dims": 2})
    head_dim = config.pop("num_head_channels", 64)
    if not config.pop("use_new_attention_order", False):
        group_heads_by_part(weights, head_dim)

    layers_per_block = _layers_per_block(weights)
    num_inputs = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("input_blocks."))
    first_blocks = range(1, num_inputs, layers_per_block + 1)  # of each level, whose last block samples down
    widths = [len(weights[f"input_blocks.{index}.0.out_layers.3.weight"]) for index in first_blocks]
    attends = [f"input_blocks.{index}.1.qkv.weight" in weights for index in first_blocks]
    for name in ("channel_mult", "num_res_blocks", "attention_resolutions", "dropout", "conv_resample"):
        config.pop(name, None)  # read from the weights, or not needed for sampling
    model_channels = config.pop("model_channels", weights["time_embed.0.weight"].shape[1])
    if widths[0] != model_channels:
        raise ValueError(
            f"Expected the first level to have `model_channels`, {model_channels}, channels, as `UNet2DModel` will have it, but "
            f"got {widths[0]}."
        )
    num_classes = config.pop("num_classes", None)
    if "label_emb.weight" in weights:
        num_classes = len(weights["label_emb.weight"])
    return UNet2DModel(
        sample_size=config.pop("image_size", 256),
        in_channels=config.pop("in_channels", weights["input_blocks.0.0.weight"].shape[1]),
        out_channels=config.pop("out_channels", len(weights["out.2.weight"])),
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if each else "ResnetDownsampleBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "ResnetUpsampleBlock2D" for each in attends[::-1]),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=head_dim,
        attn_norm_num_groups=32,
        num_class_embeds=num_classes,
    )


def load_adm_unet(model: UNet2DModel, weights: dict[str, torch.Tensor]) -> None:
    """
    Load ADM's weights into a model.

    Args:
        model ([`UNet2DModel`]): What [`build_adm_unet`] made of these weights.
        weights (`dict[str, torch.Tensor]`): The weights under the original's names.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape; it is named.
    """
    load_renamed(model, weights, _module_names(model), _translated)


def _layers_per_block(weights: dict[str, torch.Tensor]) -> int:
    """Count the residual blocks of a level on the way down. On the way up there is one more, and one for upsampling."""
    blocks = {tuple(key.split(".")[:3]) for key in weights if key.startswith("output_blocks.") and "in_layers" in key}
    num_outputs = len({index for _, index, _ in blocks})
    num_levels = 1 + sum(place != "0" for *_, place in blocks)
    return num_outputs // num_levels - 1


def _module_names(model: UNet2DModel) -> dict[str, str]:
    """Map the names of Diffusers' modules to the original's."""
    names = {ours: original for original, ours in _TOP.items()}

    def add_resnet(ours: str, original: str) -> None:
        names.update({f"{ours}.{name}": f"{original}.{part}" for part, name in _RESNET.items()})

    def add_attention(ours: str, original: str) -> None:
        names.update({f"{ours}.{name}": f"{original}.{part}" for part, name in _ATTENTION.items()})
        names.update({f"{ours}.to_{part}": f"{original}.qkv" for part in "qkv"})

    for kind, original, index in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for level, block in enumerate(getattr(model, f"{kind}_blocks")):
            ours, attends = f"{kind}_blocks.{level}", hasattr(block, "attentions")
            for layer in range(len(block.resnets)):
                add_resnet(f"{ours}.resnets.{layer}", f"{original}.{index}.0")
                if attends:
                    add_attention(f"{ours}.attentions.{layer}", f"{original}.{index}.1")
                index += 1
            if kind == "down" and block.downsamplers is not None:
                add_resnet(f"{ours}.downsamplers.0", f"{original}.{index}.0")
                index += 1
            if kind == "up" and block.upsamplers is not None:  # after the level's last block
                add_resnet(f"{ours}.upsamplers.0", f"{original}.{index - 1}.{1 + attends}")
    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_attention("mid_block.attentions.0", "middle_block.1")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    return names


def _translated(name: str, tensor: torch.Tensor, model: UNet2DModel) -> torch.Tensor:
    """Turn an original tensor into Diffusers'. One whose shape does not fit is returned as it is, to be refused by name."""
    expected = model.get_parameter(name).shape
    tensor = split_qkv(name, tensor)
    return (
        tensor.view(expected) if tensor.numel() == expected.numel() else tensor
    )  # the projections are convolutions there
