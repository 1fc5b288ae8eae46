"""A small pipeline of each system, with random weights."""

from conftest import randomised
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    DiTModel,
    DTRTransformer2DModel,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
)

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "in_channels": 1,
    "num_classes": 10,
}
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "num_classes": 10,
    "model_channels": 32,
    "channel_multipliers": [1],
    "layers_per_block": 1,
    "attention_levels": [],
    "attention_head_dim": 32,
}


def make_vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return randomised(
        AutoencoderKL(
            1, 1, block_out_channels=(4,), norm_num_groups=2, latent_channels=1, layers_per_block=1, **blocks
        )
    )


def with_one(denoiser: nn.Module, **components) -> ClassConditionalPipeline:
    return ClassConditionalPipeline(randomised(denoiser), DDIMScheduler(), **components)


def patched() -> ClassConditionalPipeline:
    transformer = DiTModel(**DIT)
    return with_one(transformer, prompt_patch=randomised(PromptPatch.for_transformer(transformer)))


def split() -> SNRSplitPipeline:
    """A pipeline with denoisers of three classes, whose code files have the same name."""
    denoisers = [
        PatchedUNet2DModel(**UNET),
        RemixDiTModel(**DIT, num_bases=2, num_experts=4),
        DTRTransformer2DModel(**DIT),
    ]
    return SNRSplitPipeline([randomised(each) for each in denoisers], DDIMScheduler(), snr_boundaries=[4.0, 0.1])


PIPELINES = {
    "dit": lambda: with_one(DiTModel(**DIT)),
    "dtr": lambda: with_one(DTRTransformer2DModel(**DIT)),
    "remix": lambda: with_one(RemixDiTModel(**DIT, num_bases=2, num_experts=4)),
    "dmp": patched,
    "unet": lambda: with_one(PatchedUNet2DModel(**UNET)),
    "split": split,
}


def make_all() -> dict[str, DiffusionPipeline]:
    return {name: make() for name, make in PIPELINES.items()}
