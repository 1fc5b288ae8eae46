"""Patch Diffusion: the time that larger patches of pixels save, and the cost of switching between the denoisers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_dmp import PatchedUNet2DModel, SNRSplitPipeline
from diffusers_dmp.evaluation.costs import gigaflops

from .timing import Ratio, Settings

TARGETS = {2: 0.34, 4: 0.17, 8: 0.09}  # by patch size
CHANNELS, MULTIPLIERS, IMAGE_SIZE, BATCH_SIZE = 64, (1, 2, 2), 64, 4


def patched_unet(patch_size: int) -> PatchedUNet2DModel:
    """Make a UNet on patches of a size; the widths are the same for every size, and only the middle has attention."""
    return PatchedUNet2DModel(
        sample_size=IMAGE_SIZE,
        patch_size=patch_size,
        model_channels=CHANNELS,
        channel_multipliers=MULTIPLIERS,
        layers_per_block=2,
        attention_levels=(),
    )


def stock_unet() -> UNet2DModel:
    """Make Diffusers' UNet with the same widths."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        block_out_channels=tuple(CHANNELS * multiplier for multiplier in MULTIPLIERS),
        down_block_types=("DownBlock2D",) * len(MULTIPLIERS),
        up_block_types=("UpBlock2D",) * len(MULTIPLIERS),
        layers_per_block=2,
        attention_head_dim=64,
    )


def by_hand(pipeline: SNRSplitPipeline, latents: torch.Tensor, steps: int) -> torch.Tensor:
    """Sample with a hand-written loop, as the pipeline does."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    owners = pipeline.intervals().index(scheduler.timesteps).tolist()
    with torch.no_grad():
        for t, owner in zip(scheduler.timesteps, owners):
            prediction = pipeline.denoisers[owner](latents, t).sample
            latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare samplings and forward passes, at one size: 4 images of 64 x 64 pixels."""
    device = settings.device
    for dtype in settings.dtypes:
        sample = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=dtype)
        timestep = torch.tensor(700, device=device)
        models = {size: patched_unet(size).to(device).to(dtype).eval() for size in (1, *TARGETS)}
        stock = stock_unet().to(device).to(dtype).eval()
        flops = {size: gigaflops(model, sample, timestep) for size, model in models.items()}
        stock_flops = gigaflops(stock, sample, timestep)
        pipeline = SNRSplitPipeline([models[4], models[8]], DDIMScheduler(prediction_type="sample"), [0.25])
        pipeline.set_progress_bar_config(disable=True)
        name = settings.name_of(dtype)

        steps = 25
        sampled = [
            partial(pipeline, batch_size=BATCH_SIZE, latents=sample, num_inference_steps=steps, output_type="latent"),
            partial(by_hand, pipeline, sample, steps),
        ]
        yield settings.compare(f"{name}: SNRSplitPipeline / the loop by hand, {steps} steps", *sampled, 1.02)

        if settings.compile:
            for model in (*models.values(), stock):
                model.compile(dynamic=False)

        @torch.no_grad()
        def forward(model, sample=sample, timestep=timestep):
            model(sample, timestep)

        for size, target in TARGETS.items():
            what = f"{name}: P={size} ({flops[size]:.2f} GFLOPs) / P=1 ({flops[1]:.2f} GFLOPs)"
            yield settings.compare(what, partial(forward, models[size]), partial(forward, models[1]), target)

        what = f"{name}: P=1 ({flops[1]:.2f} GFLOPs) / UNet2DModel ({stock_flops:.2f} GFLOPs), per FLOP"
        ratio = settings.compare(what, partial(forward, models[1]), partial(forward, stock), 1.05)
        scale = stock_flops / flops[1]
        yield replace(ratio, ratio=scale * ratio.ratio, low=scale * ratio.low, high=scale * ratio.high)
