"""DTR against the plain DiT that it wraps, and against Diffusers' own DiT."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DiTTransformer2DModel

from diffusers_dmp import DiTModel, DTRTransformer2DModel
from diffusers_dmp.models.dit.model import DIT_PRESETS

from .timing import Ratio, compare


def stock_dit(preset: str) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(**DIT_PRESETS[preset], in_channels=4, out_channels=8, sample_size=32)


def run(
    preset: str, device: torch.device, dtypes: list[torch.dtype], batch_sizes: list[int], compile: bool, budget: float
) -> Iterator[Ratio]:
    """
    Args:
        preset (`str`): 'DiT-S/2' and so on, on 32 x 32 latents of 4 channels.
        dtypes (`list[torch.dtype]`), batch_sizes (`list[int]`): Each with each.
        compile (`bool`): Compile the models first.
        budget (`float`): Seconds per comparison.
    """
    for dtype in dtypes:
        models = [DTRTransformer2DModel.from_preset(preset), DiTModel.from_preset(preset), stock_dit(preset)]
        dtr, plain, stock = (model.to(device).to(dtype).eval() for model in models)
        if compile:
            dtr, plain, stock = (torch.compile(model) for model in (dtr, plain, stock))
        name = str(dtype).removeprefix("torch.") + (" compiled" if compile else "")

        for batch_size in batch_sizes:
            sample = torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype)
            labels = torch.randint(0, 1000, (batch_size,), device=device)
            # as the pipelines pass it
            timestep = torch.tensor(700, device=device).expand(batch_size)

            case = f"{preset} {name} batch {batch_size}"

            @torch.no_grad()
            def forward(model, sample=sample, timestep=timestep, labels=labels):
                model(sample, timestep, class_labels=labels)

            dtr_forward, plain_forward, stock_forward = (partial(forward, model) for model in (dtr, plain, stock))
            yield compare(f"{case}: DTR / DiT", dtr_forward, plain_forward, device, budget, 1.02)
            yield compare(f"{case}: DTR / Diffusers' DiT", dtr_forward, stock_forward, device, budget, 1.00)

            timesteps = torch.randint(0, 1000, (batch_size,), device=device)

            def training_step(model, sample=sample, timesteps=timesteps, labels=labels):
                model.zero_grad(set_to_none=True)
                model(sample, timesteps, class_labels=labels).sample.square().mean().backward()

            steps = [partial(training_step, model) for model in (dtr, plain)]
            yield compare(f"{case}: DTR / DiT, training step", *steps, device, budget, 1.02)

    dtr, plain = DTRTransformer2DModel.from_preset(preset), DiTModel.from_preset(preset)

    def num_bytes(model) -> int:
        return sum(buffer.nbytes for buffer in model.buffers())

    print(f"Buffers of DTR beyond DiT's: {num_bytes(dtr) - num_bytes(plain)} bytes (one window start per timestep).")
