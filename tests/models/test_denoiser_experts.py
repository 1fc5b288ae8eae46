"""Whole denoisers as experts, in the real pipelines of Diffusers."""

import functools

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import RECIPES, generate, wan, wan_pipe
from torch import nn

from diffusers_dmp import DenoiserExperts, NoiseIntervals

INTERVALS = NoiseIntervals.from_sigmas([0.6])


def make_experts(name: str, intervals: NoiseIntervals = INTERVALS) -> DenoiserExperts:
    denoisers = [RECIPES[name].denoiser(seed=seed) for seed in range(intervals.num_experts)]
    return DenoiserExperts(denoisers, intervals)


def switched_by_hand(name: str, denoisers: list[nn.Module], intervals: NoiseIntervals = INTERVALS, **config):
    """Generate with a pipeline whose denoiser is replaced between its steps, as a user would do it without this package."""
    recipe = RECIPES[name]
    pipe = recipe.pipe(denoisers[-1], **config)
    step = pipe.scheduler.step
    owners = [intervals.num_experts - 1]  # of each step; the first is the noisiest

    @functools.wraps(step)
    def step_and_switch(*args, **kwargs):
        result = step(*args, **kwargs)
        if len(owners) < len(pipe.scheduler.timesteps):
            timestep = float(pipe.scheduler.timesteps[len(owners)])
            owners.append(sum(timestep >= edge for edge in intervals.edges[1:-1]))
            setattr(pipe, recipe.component, denoisers[owners[-1]])
        return result

    pipe.scheduler.step = step_and_switch
    latents = generate(name, pipe)
    assert set(owners) == set(range(intervals.num_experts))  # every expert has steps of its own
    return latents


def reloaded(pipe: DiffusionPipeline, folder, **kwargs) -> DiffusionPipeline:
    left_out = {name: None for name, component in pipe.components.items() if component is None}
    loaded = type(pipe).from_pretrained(folder, **left_out, **kwargs)
    for component in loaded.components.values():
        if isinstance(component, nn.Module):
            in_own_memory(component)
    return loaded


def in_own_memory(model: nn.Module) -> nn.Module:
    """Weights that lie where their file is mapped are read at other addresses, which changes the last bits of any model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_a_switch_by_hand_before_and_after_saving(name, tmp_path):
    denoisers = [RECIPES[name].denoiser(seed=seed) for seed in range(2)]
    expected = switched_by_hand(name, denoisers)
    pipe = RECIPES[name].pipe(DenoiserExperts(denoisers, INTERVALS))
    assert torch.equal(generate(name, pipe), expected)

    pipe.save_pretrained(tmp_path)
    loaded = reloaded(pipe, tmp_path)
    experts = getattr(loaded, RECIPES[name].component)
    assert isinstance(experts, DenoiserExperts) and experts.intervals == INTERVALS
    assert torch.equal(generate(name, loaded), expected)


def test_one_time_per_token():
    """Wan's 5B model is told the time of each token, 0 for those of a given image."""
    denoisers = [wan(seed) for seed in range(2)]
    expected = switched_by_hand("wan", denoisers, expand_timesteps=True)
    pipe = wan_pipe(DenoiserExperts(denoisers, INTERVALS), expand_timesteps=True)
    assert torch.equal(generate("wan", pipe), expected)


def test_equal_to_the_two_transformers_of_wan_22():
    low, high = wan(0), wan(1, num_layers=1)
    intervals = NoiseIntervals.from_sigmas([0.875])
    pipe = wan_pipe(high, transformer_2=low, boundary_ratio=0.875)
    expected = generate("wan", pipe)
    assert torch.equal(generate("wan", wan_pipe(DenoiserExperts([low, high], intervals))), expected)
    assert not torch.equal(generate("wan", wan_pipe(low)), expected)
