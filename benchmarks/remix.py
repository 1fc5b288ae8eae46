"""Remix-DiT compared with the plain DiT, whose cost each of its experts should have."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch

from diffusers_dmp import DiTModel, RemixDiTModel
from diffusers_dmp.models.remix_layers import BasisLinear

from .timing import Ratio, Settings

TRAINING_TARGETS = {1: 1.32, 8: 1.05}  # by batch size


def published_mix(linear: BasisLinear, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix the bases as the published code does: scale copies of them, and add these."""
    a = coefficients.to(linear.weight.dtype)[0]  # (K,)
    weight = (a[:, None, None] * linear.weight).sum(0, keepdim=True)
    bias = (a[:, None] * linear.bias).sum(0, keepdim=True)
    return weight, bias


def published_fuse(linear: BasisLinear, coefficients: torch.Tensor) -> None:
    """Make new weights at every call, as the published code does."""
    linear._fused = tuple(mixture.squeeze(0) for mixture in published_mix(linear, coefficients))


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare forward passes and training steps, with 4 bases and 8 experts; `compile` compiles the blocks."""
    preset, device = settings.preset, settings.device
    for dtype in settings.dtypes:
        models = RemixDiTModel.from_preset(f"Remix{preset}"), DiTModel.from_preset(preset)
        remix, plain = (model.to(device).to(dtype).eval() for model in models)
        if settings.compile:
            for model in (remix, plain):
                model.compile_repeated_blocks()

        for batch_size in settings.batch_sizes:
            case = f"{preset} {settings.name_of(dtype)} batch {batch_size}"
            sample = torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype)
            labels = torch.randint(0, 1000, (batch_size,), device=device)

            @torch.no_grad()
            def forward(model, timestep, sample=sample, labels=labels):
                return model(sample, timestep, class_labels=labels).sample

            timestep = torch.tensor(700).expand(batch_size)  # as the pipeline passes it
            forwards = [partial(forward, model, timestep) for model in (remix, plain)]
            yield settings.compare(f"{case}: Remix-DiT / DiT", *forwards, 1.02)

            @patch.object(BasisLinear, "fuse", published_fuse)
            def published_forward(timestep=timestep, forward=forward, remix=remix):
                remix.eval()  # drops the cached mixture, as the published code mixes at every call
                forward(remix, timestep)

            yield settings.compare(f"{case}: mixed as published / DiT", published_forward, forwards[1])

            if batch_size > 1:
                timesteps = torch.randint(0, 1000, (batch_size,))
                forwards = [partial(forward, model, timesteps) for model in (remix, plain)]
                yield settings.compare(f"{case}, mixed timesteps: Remix-DiT / DiT", *forwards, 1.25)

            # timesteps of one expert, as the training loop samples them
            timesteps = remix.intervals.sample(5, batch_size).to(device)

            def training_step(model, timesteps=timesteps, sample=sample, labels=labels, **expert):
                model.zero_grad(set_to_none=True)
                model(sample, timesteps, class_labels=labels, **expert).sample.square().mean().backward()

            steps = partial(training_step, remix, expert=5), partial(training_step, plain)
            case = f"{case}, training step"
            yield settings.compare(f"{case}: Remix-DiT / DiT", *steps, TRAINING_TARGETS.get(batch_size))
            published_step = patch.object(BasisLinear, "mix", published_mix)(steps[0])
            yield settings.compare(f"{case}: mixed as published / DiT", published_step, steps[1])
