"""DTR compared with the plain DiT that it extends, and with Diffusers' own DiT."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.models.dit.model import DIT_PRESETS

from .denoisers import sampling_inputs
from .timing import Ratio, Settings


def stock_dit(preset: str) -> DiTTransformer2DModel:
    """Make Diffusers' DiT of a preset's size."""
    return DiTTransformer2DModel(**DIT_PRESETS[preset], in_channels=4, out_channels=8, sample_size=32)


def num_buffer_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's buffers."""
    return sum(buffer.nbytes for buffer in model.buffers())


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare forward passes and training steps, and print the size of DTR's buffers."""
    preset, device = settings.preset, settings.device
    for dtype in settings.dtypes:
        with device:
            models = [DTRTransformer2DModel.from_preset(preset), DiTModel.from_preset(preset), stock_dit(preset)]
        dtr, plain, stock = (settings.compiled(model.to(device).to(dtype).eval()) for model in models)

        for batch_size in settings.batch_sizes:
            case = f"{preset} {settings.name_of(dtype)} batch {batch_size}"

            @torch.no_grad()
            def forward(model, inputs):
                model(**inputs)

            dtr_forward, plain_forward, stock_forward = (
                partial(forward, model, sampling_inputs(model, batch_size, device, dtype))
                for model in (dtr, plain, stock)
            )
            yield settings.compare(f"{case}: DTR / DiT", dtr_forward, plain_forward, 1.02)
            yield settings.compare(f"{case}: DTR / Diffusers' DiT", dtr_forward, stock_forward, 1.00)

            sample = torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype)
            labels = torch.randint(0, 1000, (batch_size,), device=device)
            timesteps = torch.randint(0, 1000, (batch_size,), device=device)

            def training_step(model, sample=sample, timesteps=timesteps, labels=labels):
                model.zero_grad(set_to_none=True)
                model(sample, timesteps, class_labels=labels).sample.square().mean().backward()

            steps = [partial(training_step, model) for model in (dtr, plain)]
            yield settings.compare(f"{case}: DTR / DiT, training step", *steps, 1.02)

    dtr, plain = DTRTransformer2DModel.from_preset(preset), DiTModel.from_preset(preset)
    difference = num_buffer_bytes(dtr) - num_buffer_bytes(plain)
    print(f"Buffers of DTR beyond DiT's: {difference} bytes (one window start per timestep).")
