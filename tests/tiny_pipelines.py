"""Tiny random models of Diffusers' real classes in their real pipelines, called with precomputed prompt embeddings.

`RECIPES[name].pipe(denoiser)` makes a pipeline, `generate(name, pipe)` runs it; the denoiser has random weights everywhere, for
layers that start at zero would hide errors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

TEXT = {"text_encoder": None, "tokenizer": None}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def filled(model: torch.nn.Module, seed: int) -> Any:
    """Give all weights random values, those of norms around 1."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") and parameter.ndim == 1 else 0.0
            std = 0.05 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return model.eval()


def image_vae(latent_channels: int, shift_factor: float | None = 0.0609) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift_factor,
        scaling_factor=1.5035,
    ).eval()


def sd3(seed: int = 0, num_layers: int = 2, **config: Any) -> SD3Transformer2DModel:
    sizes = {
        "sample_size": 32,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": num_layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 64,
        "out_channels": 4,
    }
    return filled(SD3Transformer2DModel(**sizes | config), seed)


def sd3_pipe(transformer: Any) -> StableDiffusion3Pipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    others = {"text_encoder_2": None, "tokenizer_2": None, "text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=image_vae(4), **TEXT, **others)


def sd3_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, 32),
        "negative_prompt_embeds": randn(1, 7, 32, seed=1),
        "pooled_prompt_embeds": randn(1, 64),
        "negative_pooled_prompt_embeds": randn(1, 64, seed=1),
        "height": 8,
        "width": 8,
        "guidance_scale": 5.0,
    }


def flux(seed: int = 0, num_layers: int = 1, num_single_layers: int = 2, **config: Any) -> FluxTransformer2DModel:
    sizes = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
        "guidance_embeds": False,
    }
    return filled(FluxTransformer2DModel(**sizes | config), seed)


def flux_pipe(transformer: Any) -> FluxPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler()
    others = {"text_encoder_2": None, "tokenizer_2": None}
    return FluxPipeline(transformer=transformer, scheduler=scheduler, vae=image_vae(1), **TEXT, **others)


def flux_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, 32),
        "pooled_prompt_embeds": randn(1, 32),
        "negative_prompt_embeds": randn(1, 7, 32, seed=1),
        "negative_pooled_prompt_embeds": randn(1, 32, seed=1),
        "true_cfg_scale": 3.0,
        "height": 8,
        "width": 8,
        "guidance_scale": 5.0,
    }


def wan(seed: int = 0, num_layers: int = 2, **config: Any) -> WanTransformer3DModel:
    sizes = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return filled(WanTransformer3DModel(**sizes | config), seed)


def wan_pipe(transformer: Any, **config: Any) -> WanPipeline:
    """Wan 2.1; with `transformer_2` and `boundary_ratio` Wan 2.2, with `expand_timesteps=True` its 5B model."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(transformer=transformer, scheduler=scheduler, vae=vae.eval(), **TEXT, **config)


def wan_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 16, 32),
        "negative_prompt_embeds": randn(1, 16, 32, seed=1),
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "guidance_scale": 6.0,
    }


def pixart(seed: int = 0, num_layers: int = 2, **config: Any) -> PixArtTransformer2DModel:
    sizes = {
        "sample_size": 8,
        "num_layers": num_layers,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_channels": 32,
        "in_channels": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return filled(PixArtTransformer2DModel(**sizes | config), seed)


def pixart_pipe(transformer: Any) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(transformer=transformer, scheduler=DDIMScheduler(), vae=image_vae(4, None), **TEXT)


def pixart_call() -> dict[str, Any]:
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": randn(1, 7, 32),
        "prompt_attention_mask": torch.ones(1, 7),
        "negative_prompt_embeds": randn(1, 7, 32, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 7),
        "use_resolution_binning": False,
        "height": 8,
        "width": 8,
        "guidance_scale": 5.0,
    }


def zimage(seed: int = 0, n_layers: int = 2, **config: Any) -> ZImageTransformer2DModel:
    sizes = {
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 32,
        "n_layers": n_layers,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "qk_norm": True,
        "cap_feat_dim": 16,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    return filled(ZImageTransformer2DModel(**sizes | config), seed)


def zimage_pipe(transformer: Any) -> ZImagePipeline:
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        latent_channels=16,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return ZImagePipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), **TEXT)


def zimage_call() -> dict[str, Any]:
    return {
        "prompt_embeds": [randn(7, 16)],
        "negative_prompt_embeds": [randn(7, 16, seed=1)],
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
    }


def qwen(seed: int = 0, num_layers: int = 2, **config: Any) -> QwenImageTransformer2DModel:
    sizes = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": num_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 3,
        "joint_attention_dim": 16,
        "axes_dims_rope": (8, 4, 4),
    }
    return filled(QwenImageTransformer2DModel(**sizes | config), seed)


def qwen_pipe(transformer: Any) -> QwenImagePipeline:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return QwenImagePipeline(transformer=transformer, scheduler=scheduler, vae=vae.eval(), **TEXT)


def qwen_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, 16),
        "prompt_embeds_mask": torch.ones(1, 7).long(),
        "negative_prompt_embeds": randn(1, 7, 16, seed=1),
        "negative_prompt_embeds_mask": torch.ones(1, 7).long(),
        "true_cfg_scale": 3.0,
        "height": 32,
        "width": 32,
    }


def _unet(seed: int, **config: Any) -> UNet2DConditionModel:
    sizes = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 2,
    }
    return filled(UNet2DConditionModel(**sizes | config), seed)


def sdxl(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    sizes = {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 2),
        "projection_class_embeddings_input_dim": 80,
        "cross_attention_dim": 64,
    }
    return _unet(seed, **sizes | config)


def sdxl_pipe(unet: Any) -> StableDiffusionXLPipeline:
    others = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
    return StableDiffusionXLPipeline(
        unet=unet, scheduler=EulerDiscreteScheduler(), vae=image_vae(4, None), **TEXT, **others
    )


def sdxl_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, 64),
        "negative_prompt_embeds": randn(1, 7, 64, seed=1),
        "pooled_prompt_embeds": randn(1, 32),
        "negative_pooled_prompt_embeds": randn(1, 32, seed=1),
        "height": 8,
        "width": 8,
        "guidance_scale": 5.0,
    }


def sd15(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    return _unet(seed, **{"attention_head_dim": 2, "cross_attention_dim": 32} | config)


def sd15_pipe(unet: Any) -> StableDiffusionPipeline:
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=unet, scheduler=DDIMScheduler(), vae=image_vae(4, None), **TEXT, **others)


def sd15_call() -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, 32),
        "negative_prompt_embeds": randn(1, 7, 32, seed=1),
        "height": 8,
        "width": 8,
        "guidance_scale": 5.0,
    }


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        denoiser: Makes a denoiser from a seed; also takes other entries of its configuration.
        pipe: Makes the pipeline of a denoiser.
        call: Makes the arguments of a call, without steps, generator and output type.
        component: The denoiser's name in the pipeline.
    """

    denoiser: Callable[..., Any]
    pipe: Callable[..., Any]
    call: Callable[[], dict[str, Any]]
    component: str = "transformer"


RECIPES = {
    "sd3": Recipe(sd3, sd3_pipe, sd3_call),
    "flux": Recipe(flux, flux_pipe, flux_call),
    "wan": Recipe(wan, wan_pipe, wan_call),
    "pixart": Recipe(pixart, pixart_pipe, pixart_call),
    "zimage": Recipe(zimage, zimage_pipe, zimage_call),
    "qwen": Recipe(qwen, qwen_pipe, qwen_call),
    "sdxl": Recipe(sdxl, sdxl_pipe, sdxl_call, "unet"),
    "sd15": Recipe(sd15, sd15_pipe, sd15_call, "unet"),
}


def generate(name: str, pipe: Any, num_inference_steps: int = 6, **call: Any) -> torch.Tensor:
    """Run a pipeline of `RECIPES` and return its latents."""
    pipe.set_progress_bar_config(disable=True)
    arguments = RECIPES[name].call() | {"generator": seeded(), "output_type": "latent"} | call
    return pipe(num_inference_steps=num_inference_steps, return_dict=False, **arguments)[0]
