"""Guidance with flow matching: v' = v - s·σ/(1-σ)·∇log p."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gaussian_mixture import DDPM, FLOW, GaussianMixture, MixtureExperts

from diffusers_dmp import ClassTarget, GuidedScheduler

MIXTURE = GaussianMixture.random(5, (1, 2, 2))


@pytest.mark.parametrize(("noise_schedule", "tolerance"), [(FLOW, 1e-10), (DDPM, 1e-4)], ids=["flow", "ddpm"])
def test_the_guided_velocity_is_that_of_the_class(noise_schedule, tolerance):
    """
    The velocity of all classes, guided with scale 1 by the exact classifier, is that of the class; in a step of Euler's method,
    which is x_t + (σ' - σ)·v, in float64.
    """
    experts = MixtureExperts(MIXTURE, noise_schedule)
    x_t = MIXTURE.sample(torch.arange(5)) + torch.randn(5, 1, 2, 2, dtype=torch.float64)
    for position in range(2, 20):
        velocities = []
        scheduler = GuidedScheduler(_Recorded(), experts, ClassTarget(2), scale=1.0)
        scheduler.velocities = velocities
        scheduler.set_timesteps(20)
        scheduler.set_begin_index(position)
        sigma = scheduler.sigmas[position].double()
        scheduler.step(MIXTURE.velocity(x_t, sigma), scheduler.timesteps[position], x_t)
        expected = MIXTURE.velocity(x_t, sigma, label=2)
        assert (velocities[0] - expected).norm() / expected.norm() < tolerance


class _Recorded(FlowMatchEulerDiscreteScheduler):
    """A scheduler that keeps the velocities that it is given: its own steps are in float32."""

    def step(self, model_output, *args, **kwargs):
        self.velocities.append(model_output)
        return super().step(model_output, *args, **kwargs)
