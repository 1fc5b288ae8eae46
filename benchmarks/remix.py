"""Remix-DiT against the plain DiT, whose cost its experts are meant to have."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch

from diffusers_dmp import DiTModel, RemixDiTModel
from diffusers_dmp.models.remix_layers import BasisLinear

from .timing import Ratio, compare

TRAINING_TARGETS = {1: 1.32, 8: 1.05}  # by batch size


def published_mix(linear: BasisLinear, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bases' scaled copies, added up."""
    a = coefficients.to(linear.weight.dtype)[0]  # (K,)
    weight = (a[:, None, None] * linear.weight).sum(0, keepdim=True)
    bias = (a[:, None] * linear.bias).sum(0, keepdim=True)
    return weight, bias


def run(
    preset: str, device: torch.device, dtypes: list[torch.dtype], batch_sizes: list[int], compile: bool, budget: float
) -> Iterator[Ratio]:
    """
    Args:
        preset (`str`): 'DiT-S/2' and so on, on 32 x 32 latents of 4 channels; 4 bases, 8 experts.
        dtypes (`list[torch.dtype]`), batch_sizes (`list[int]`): Each with each.
        compile (`bool`): Compile the blocks first.
        budget (`float`): Seconds per comparison.
    """
    for dtype in dtypes:
        models = RemixDiTModel.from_preset(f"Remix{preset}"), DiTModel.from_preset(preset)
        remix, plain = (model.to(device).to(dtype).eval() for model in models)
        if compile:
            for model in (remix, plain):
                model.compile_repeated_blocks()
        name = str(dtype).removeprefix("torch.") + (" compiled" if compile else "")

        for batch_size in batch_sizes:
            case = f"{preset} {name} batch {batch_size}"
            sample = torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype)
            labels = torch.randint(0, 1000, (batch_size,), device=device)

            @torch.no_grad()
            def forward(model, timestep, sample=sample, labels=labels):
                return model(sample, timestep, class_labels=labels).sample

            # as the pipeline passes it
            timestep = torch.tensor(700).expand(batch_size)
            forwards = [partial(forward, model, timestep) for model in (remix, plain)]
            yield compare(f"{case}: Remix-DiT / DiT", *forwards, device, budget, 1.02)

            @patch.object(BasisLinear, "mix", published_mix)
            def published_forward(timestep=timestep, forward=forward, remix=remix):
                remix.eval()  # forgets the mixture: it was made at every call
                forward(remix, timestep)

            yield compare(f"{case}: mixed as published / DiT", published_forward, forwards[1], device, budget)

            if batch_size > 1:
                timesteps = torch.randint(0, 1000, (batch_size,))
                forwards = [partial(forward, model, timesteps) for model in (remix, plain)]
                yield compare(f"{case}, mixed timesteps: Remix-DiT / DiT", *forwards, device, budget, 1.25)

            # one expert's timesteps, as the training loop draws them
            timesteps = remix.intervals.sample(5, batch_size).to(device)

            def training_step(model, timesteps=timesteps, sample=sample, labels=labels, **expert):
                model.zero_grad(set_to_none=True)
                model(sample, timesteps, class_labels=labels, **expert).sample.square().mean().backward()

            steps = partial(training_step, remix, expert=5), partial(training_step, plain)
            case = f"{case}, training step"
            yield compare(f"{case}: Remix-DiT / DiT", *steps, device, budget, TRAINING_TARGETS.get(batch_size))
            published_step = patch.object(BasisLinear, "mix", published_mix)(steps[0])
            yield compare(f"{case}: mixed as published / DiT", published_step, steps[1], device, budget)
