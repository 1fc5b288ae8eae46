"""Remix-DiT compared with the plain DiT, whose cost each of its experts should have."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch

from diffusers_dmp import DiTModel, RemixDiTModel
from diffusers_dmp.models.remix_layers import BasisLinear

from .denoisers import sampling_inputs, training_inputs
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
        with device:
            models = RemixDiTModel.from_preset(f"Remix{preset}"), DiTModel.from_preset(preset)
        remix, plain = (model.to(device).to(dtype).eval() for model in models)
        if settings.compile:
            for model in (remix, plain):
                model.compile_repeated_blocks(dynamic=False)

        for batch_size in settings.batch_sizes:
            case = f"{preset} {settings.name_of(dtype)} batch {batch_size}"

            @torch.no_grad()
            def forward(model, inputs):
                return model(**inputs).sample

            inputs = [sampling_inputs(model, batch_size, device, dtype) for model in (remix, plain)]
            forwards = [partial(forward, model, own) for model, own in zip((remix, plain), inputs)]
            yield settings.compare(f"{case}: Remix-DiT / DiT", *forwards, 1.02)

            @patch.object(BasisLinear, "fuse", published_fuse)
            def published_forward(remix=remix, forward=forwards[0]):
                remix.eval()  # drops the cached mixture, as the published code mixes at every call
                forward()

            yield settings.compare(f"{case}: mixed as published / DiT", published_forward, forwards[1])

            if batch_size > 1:
                timesteps = torch.randint(0, 1000, (batch_size,))
                mixed = [own | {"timestep": timesteps.to(own["timestep"].device)} for own in inputs]
                steps = [partial(forward, model, own) for model, own in zip((remix, plain), mixed)]
                yield settings.compare(f"{case}, mixed timesteps: Remix-DiT / DiT", *steps, 1.25)

            # timesteps of one expert, as the training loop samples them
            batch = training_inputs(remix, batch_size, device)
            batch["hidden_states"] = batch["hidden_states"].to(dtype)

            def training_step(model, inputs):
                model.zero_grad(set_to_none=True)
                model(**inputs).sample.square().mean().backward()

            plain_batch = {name: value for name, value in batch.items() if name != "expert"}
            steps = partial(training_step, remix, batch), partial(training_step, plain, plain_batch)
            case = f"{case}, training step"
            yield settings.compare(f"{case}: Remix-DiT / DiT", *steps, TRAINING_TARGETS.get(batch_size))
            published_step = patch.object(BasisLinear, "mix", published_mix)(steps[0])
            yield settings.compare(f"{case}: mixed as published / DiT", published_step, steps[1])
