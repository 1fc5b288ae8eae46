"""Tiny random models of the denoisers that Diffusers has, called directly: a batch of two samples at any timesteps.

`DENOISERS[name]()` makes a denoiser and the other arguments of a call; `call(denoiser, inputs, timesteps)` tells it the time as
its class is told it, and returns the outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    SanaTransformer2DModel,
    UNet2DModel,
)
from tiny_pipelines import filled, flux, pixart, qwen, randn, sd3, sd15, sdxl, wan, zimage

from diffusers_dmp import DiTModel, PatchedUNet2DModel
from diffusers_dmp.models import time_argument_of

Inputs = dict[str, Any]
BATCH = 2


def _sd3() -> tuple[Any, Inputs]:
    image, text = randn(BATCH, 4, 8, 8), randn(BATCH, 7, 32)
    return sd3(), {
        "hidden_states": image,
        "encoder_hidden_states": text,
        "pooled_projections": randn(BATCH, 64),
    }


def _ids(num_image: int, num_text: int, width: int, batch: tuple[int, ...] = ()) -> Inputs:
    return {"img_ids": torch.zeros(*batch, num_image, width), "txt_ids": torch.zeros(*batch, num_text, width)}


def _flux() -> tuple[Any, Inputs]:
    inputs = {"hidden_states": randn(BATCH, 16, 4), "encoder_hidden_states": randn(BATCH, 7, 32)}
    return flux(num_layers=2), inputs | {"pooled_projections": randn(BATCH, 32)} | _ids(16, 7, 3)


def _flux2() -> tuple[Any, Inputs]:
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    inputs = {"hidden_states": randn(BATCH, 16, 4), "encoder_hidden_states": randn(BATCH, 7, 32)}
    return filled(model, 0), inputs | _ids(16, 7, 4)


def _chroma() -> tuple[Any, Inputs]:
    model = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = {"hidden_states": randn(BATCH, 16, 4), "encoder_hidden_states": randn(BATCH, 7, 32)}
    return filled(model, 0), inputs | _ids(16, 7, 3)


def _qwen() -> tuple[Any, Inputs]:
    inputs = {
        "hidden_states": randn(BATCH, 16, 16),
        "encoder_hidden_states": randn(BATCH, 7, 16),
        "encoder_hidden_states_mask": torch.ones(BATCH, 7).long(),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }
    return qwen(), inputs


def _zimage() -> tuple[Any, Inputs]:
    images, texts = randn(BATCH, 16, 1, 8, 8), randn(BATCH, 7, 16)
    return zimage(n_layers=3), {"x": list(images), "cap_feats": list(texts)}


def _lumina2() -> tuple[Any, Inputs]:
    model = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    inputs = {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, 7, 16),
        "encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool),
    }
    return filled(model, 0), inputs


def _sana() -> tuple[Any, Inputs]:
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
    )
    return filled(model, 0), {"hidden_states": randn(BATCH, 4, 8, 8), "encoder_hidden_states": randn(BATCH, 7, 8)}


def _wan() -> tuple[Any, Inputs]:
    return wan(), {"hidden_states": randn(BATCH, 16, 2, 4, 4), "encoder_hidden_states": randn(BATCH, 7, 32)}


def _pixart() -> tuple[Any, Inputs]:
    inputs = {
        "hidden_states": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, 7, 32),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return pixart(), inputs


def _ltx() -> tuple[Any, Inputs]:
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": randn(BATCH, 8, 4),
        "encoder_hidden_states": randn(BATCH, 7, 16),
        "encoder_attention_mask": torch.ones(BATCH, 7),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }
    return filled(model, 0), inputs


def _cogvideox() -> tuple[Any, Inputs]:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    return filled(model, 0), {"hidden_states": randn(BATCH, 2, 4, 8, 8), "encoder_hidden_states": randn(BATCH, 8, 8)}


def _hunyuan_video() -> tuple[Any, Inputs]:
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    inputs = {
        "hidden_states": randn(BATCH, 4, 1, 4, 4),
        "encoder_hidden_states": randn(BATCH, 7, 16),
        "encoder_attention_mask": torch.ones(BATCH, 7),
        "pooled_projections": randn(BATCH, 8),
    }
    return filled(model, 0), inputs


def _sdxl() -> tuple[Any, Inputs]:
    inputs = {
        "sample": randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": randn(BATCH, 7, 64),
        "added_cond_kwargs": {"text_embeds": randn(BATCH, 32), "time_ids": torch.ones(BATCH, 6)},
    }
    return sdxl(), inputs


def _sd15() -> tuple[Any, Inputs]:
    return sd15(), {"sample": randn(BATCH, 4, 8, 8), "encoder_hidden_states": randn(BATCH, 7, 32)}


def _unet2d() -> tuple[Any, Inputs]:
    model = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(8, 16),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    return filled(model, 0), {"sample": randn(BATCH, 3, 8, 8)}


_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}


def _stock_dit() -> tuple[Any, Inputs]:
    model = DiTTransformer2DModel(**_DIT, out_channels=8, patch_size=2, num_embeds_ada_norm=1000)
    return filled(model, 0), {"hidden_states": randn(BATCH, 4, 8, 8), "class_labels": torch.tensor([1, 7])}


def _dit() -> tuple[Any, Inputs]:
    model = DiTModel(**_DIT, num_classes=10)
    return filled(model, 0), {"hidden_states": randn(BATCH, 4, 8, 8), "class_labels": torch.tensor([1, 7])}


def _patched_unet() -> tuple[Any, Inputs]:
    model = PatchedUNet2DModel(
        sample_size=16,
        patch_size=4,
        model_channels=32,
        channel_multipliers=(1, 2),
        attention_levels=(1,),
        attention_head_dim=32,
    )
    return filled(model, 0), {"sample": randn(BATCH, 3, 16, 16)}


DENOISERS: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    "sd3": _sd3,
    "flux": _flux,
    "flux2": _flux2,
    "chroma": _chroma,
    "qwen": _qwen,
    "zimage": _zimage,
    "lumina2": _lumina2,
    "sana": _sana,
    "wan": _wan,
    "pixart": _pixart,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
    "hunyuan_video": _hunyuan_video,
    "sdxl": _sdxl,
    "sd15": _sd15,
    "unet2d": _unet2d,
    "stock_dit": _stock_dit,
    "dit": _dit,
    "patched_unet": _patched_unet,
}


def told(denoiser: Any, timesteps: torch.Tensor) -> Inputs:
    """The argument that tells a denoiser these timesteps."""
    argument = time_argument_of(denoiser)
    value = argument.told(timesteps, 1000)
    if type(denoiser).__name__ == "LTXVideoTransformer3DModel":
        value = value[:, None]  # its blocks need one for each token
    return {argument.name: value}


def call(denoiser: Any, inputs: Inputs, timesteps: torch.Tensor) -> torch.Tensor:
    """Call a denoiser on a batch and stack the outputs of its samples."""
    output = denoiser(**inputs, **told(denoiser, timesteps), return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, list) else output


def sample_of(inputs: Inputs, index: int) -> Inputs:
    """The arguments for one sample of the batch alone."""

    def take(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: take(key, part) for key, part in value.items()}
        is_batch = isinstance(value, (torch.Tensor, list)) and len(value) == BATCH and not name.endswith("_ids")
        return value[index : index + 1] if is_batch or name == "time_ids" else value

    return {name: take(name, value) for name, value in inputs.items()}
