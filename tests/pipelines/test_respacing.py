"""Sampling timesteps as the published results chose them."""

import json

import pytest
import torch
from conftest import FIXTURES
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_dmp import respaced_timesteps

PUBLISHED = {
    name.removeprefix("respacing."): timesteps
    for name, timesteps in json.loads((FIXTURES / "diffusion.json").read_text()).items()
    if name.startswith("respacing.") and isinstance(timesteps, list)
}


@pytest.mark.parametrize("respacing", PUBLISHED)
def test_matches_the_published_code(respacing):
    assert respaced_timesteps(1000, respacing) == PUBLISHED[respacing][::-1]


@pytest.mark.parametrize("respacing", ["250", "25", "10"])
def test_an_even_respacing_is_what_diffusers_calls_linspace(respacing):
    # training saves pipelines with this setting: they use the published timesteps by default
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(int(respacing))
    assert torch.equal(scheduler.timesteps, torch.tensor(respaced_timesteps(1000, respacing)))


def test_a_ddim_respacing_is_what_diffusers_calls_leading():
    scheduler = DDIMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, torch.tensor(respaced_timesteps(1000, "ddim50")))


@pytest.mark.parametrize("respacing", [0, 1001, "ddim999999", "500,600", [1, 0]])
def test_refuses_more_timesteps_than_there_are(respacing):
    with pytest.raises(ValueError, match="respacing"):
        respaced_timesteps(1000, respacing)
