"""A small pipeline of each system, with random weights."""

from conftest import randomised
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusion3Pipeline
from tiny_pipelines import randn, sd3, sd3_call, sd3_pipe
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    NoiseIntervals,
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


def experts() -> ClassConditionalPipeline:
    """A pipeline with experts of two classes of this package, whose code has to come with them."""
    denoisers = [randomised(DiTModel(**DIT)), randomised(DTRTransformer2DModel(**DIT), seed=1)]
    model = DenoiserExperts(denoisers, NoiseIntervals.from_timesteps([400]))
    return ClassConditionalPipeline(model, DDIMScheduler())


def sd3_experts() -> StableDiffusion3Pipeline:
    """A pipeline of Diffusers with experts of its own class."""
    pipeline = sd3_pipe(DenoiserExperts([sd3(0), sd3(1, num_layers=1)], NoiseIntervals.from_sigmas([0.875])))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# the tensors of a call, which with the same latents says everything
SD3_CALL = {name: value for name, value in sd3_call().items() if name.endswith("embeds")} | {
    "latents": randn(1, 4, 8, 8)
}

PIPELINES = {
    "dit": lambda: with_one(DiTModel(**DIT)),
    "dtr": lambda: with_one(DTRTransformer2DModel(**DIT)),
    "remix": lambda: with_one(RemixDiTModel(**DIT, num_bases=2, num_experts=4)),
    "dmp": patched,
    "unet": lambda: with_one(PatchedUNet2DModel(**UNET)),
    "experts": experts,
    "split": split,
}


def make_all() -> dict[str, DiffusionPipeline]:
    return {name: make() for name, make in PIPELINES.items()}
