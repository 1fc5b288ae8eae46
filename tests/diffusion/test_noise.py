"""α, σ and signal-to-noise ratios: the formulas of the diffusion process."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.diffusion.noise import alpha_sigma, is_flow_matching, noisy_sample, signal_to_noise_ratio

ALPHAS_CUMPROD = st.floats(1e-6, 1 - 1e-6)


@given(ALPHAS_CUMPROD)
def test_alpha_and_sigma_lie_on_the_unit_circle(alpha_cumprod):
    alpha, sigma = alpha_sigma(torch.tensor(alpha_cumprod, dtype=torch.double))
    assert float(alpha**2 + sigma**2) == pytest.approx(1, rel=1e-12)
    assert float(alpha**2) == pytest.approx(alpha_cumprod, rel=1e-12)


@given(ALPHAS_CUMPROD)
def test_the_signal_to_noise_ratio_is_that_of_alpha_and_sigma(alpha_cumprod):
    alphas_cumprod = torch.tensor(alpha_cumprod, dtype=torch.double)
    alpha, sigma = alpha_sigma(alphas_cumprod)
    assert float(signal_to_noise_ratio(alphas_cumprod)) == pytest.approx(float((alpha / sigma) ** 2), rel=1e-9)


def test_adds_noise_as_diffusers_does():
    scheduler = DDPMScheduler()
    x0, noise, timesteps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in alpha_sigma(scheduler.alphas_cumprod[timesteps]))
    torch.testing.assert_close(noisy_sample(x0, noise, alpha, sigma), scheduler.add_noise(x0, noise, timesteps))


def test_knows_flow_matching():
    assert is_flow_matching(FlowMatchEulerDiscreteScheduler())
    assert is_flow_matching(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert not is_flow_matching(DDIMScheduler())
