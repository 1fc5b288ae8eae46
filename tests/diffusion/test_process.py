"""Noise processes, matched by their signal-to-noise ratios."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.diffusion.process import NoiseProcess

RECORDS = {
    "flow": {"process": "flow_matching", "num_train_timesteps": 1000},
    "linear": {"beta_schedule": "linear", "num_train_timesteps": 1000},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
}


def levels(process: NoiseProcess, t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ as the process itself has them."""
    if process.is_flow_matching:
        sigma = torch.tensor(t / 1000, dtype=torch.float64)
        return 1 - sigma, sigma
    alphas_cumprod = process.scheduler.alphas_cumprod[t].double()
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


@pytest.mark.parametrize("own", sorted(RECORDS))
@pytest.mark.parametrize("other", sorted(RECORDS))
@given(t=st.integers(20, 980))
def test_a_sample_of_one_process_is_one_of_another(own, other, t):
    """At the matched timestep, the scaled x_t has the other process's α and σ; and from there it comes back to the same t."""
    here, there = NoiseProcess.from_record(RECORDS[own]), NoiseProcess.from_record(RECORDS[other])
    alpha, sigma = levels(here, t)
    scale = there.scale_at(alpha, sigma)
    norm = scale * alpha + scale * sigma if there.is_flow_matching else torch.hypot(scale * alpha, scale * sigma)
    assert norm.item() == pytest.approx(1)
    matched = there.timestep_at(alpha, sigma)
    assert 0 <= matched <= 1000
    if 0 < matched < 999 and (other == "flow" or matched.item() == pytest.approx(round(matched.item()), abs=1e-9)):
        back = here.timestep_at(*levels(there, matched.item() if other == "flow" else round(matched.item())))
        assert back.item() == pytest.approx(t, abs=1e-3)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_its_own_timesteps_are_found_again(name):
    process = NoiseProcess.from_record(RECORDS[name])
    for t in (1, 250, 600, 998):
        assert process.timestep_at(*levels(process, t)).item() == pytest.approx(t, abs=1e-3)
        assert process.scale_at(*levels(process, t)).item() == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_noise_of_timesteps(name):
    """That of a timestep between two whole ones is between theirs."""
    process = NoiseProcess.from_record(RECORDS[name])
    for t in (1, 250, 600, 998):
        torch.testing.assert_close(process.levels_at(torch.tensor(t)), levels(process, t), rtol=1e-6, atol=1e-6)
        before, between, after = process.levels_at(torch.tensor([t, t + 0.5, t + 1]))[1]
        assert before < between < after


def test_noise_beyond_a_process_is_that_of_its_first_or_last_timestep():
    process = NoiseProcess.from_record(RECORDS["linear"])
    zero, one = torch.zeros(()), torch.ones(())
    assert process.timestep_at(zero, one) == 999 and process.timestep_at(one, zero) == 0


def test_whose_process_it_is():
    flow, linear, cosine = (NoiseProcess.from_record(RECORDS[name]) for name in ("flow", "linear", "cosine"))
    assert flow.is_process_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert flow.is_process_of(UniPCMultistepScheduler(use_flow_sigmas=True))
    assert not flow.is_process_of(DDPMScheduler()) and not linear.is_process_of(FlowMatchEulerDiscreteScheduler())
    assert linear.is_process_of(DDIMScheduler(beta_schedule="linear")) and not cosine.is_process_of(DDIMScheduler())


@pytest.mark.parametrize("record", [{"process": "edm"}, {"process": "flow_matching", "beta_start": 0.1}])
def test_refuses_what_is_no_record(record):
    with pytest.raises(ValueError, match="Expected `noise_schedule` to have a `process`"):
        NoiseProcess.from_record(record)
