"""Inputs on another device than the model: moved without waiting for an accelerator, but to the CPU."""

import pytest
import torch
from conftest import TINY_CONFIG, randomised

from diffusers_dmp import (
    DiTModel,
    DTRTransformer2DModel,
    NoiseIntervals,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
)


def make_prompted() -> DiTModel:
    model = DiTModel(**TINY_CONFIG)
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


MODELS = {
    "DiT": lambda: DiTModel(**TINY_CONFIG),
    "DTR": lambda: DTRTransformer2DModel(**TINY_CONFIG),
    "Remix-DiT": lambda: RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7),
    "prompts": make_prompted,
    "UNet": lambda: PatchedUNet2DModel(
        sample_size=8, in_channels=4, patch_size=2, model_channels=32, channel_multipliers=(1,), layers_per_block=1,
        attention_levels=(), attention_head_dim=16, num_classes=10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("system", MODELS)
@torch.no_grad()
def test_a_model_on_the_cpu_waits_for_timesteps_and_labels_of_an_accelerator(system, batch, accelerator):
    """The pretended one raises an error for a copy to the CPU that is not waited for."""
    model, (images, *others) = randomised(MODELS[system]()), batch.values()
    expected = model(images, *others).sample
    with accelerator:
        output = model(images, *accelerator.put(others)).sample
    torch.testing.assert_close(output, expected)
    assert len(accelerator.waits) >= 2


def test_experts_of_an_accelerator_are_waited_for_on_the_cpu(accelerator):
    experts, intervals = torch.tensor([0, 2, 1, 2]), NoiseIntervals.uniform(3)
    with accelerator:
        timesteps = intervals.sample(accelerator.put(experts), 4, device="cpu")
    assert torch.equal(intervals.index(timesteps), experts)
