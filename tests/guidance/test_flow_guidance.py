"""Guidance with flow matching: v' = v - s·σ/(1-σ)·∇log p, by experts that were trained on this noise or on another."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from gaussian_mixture import DDPM, FLOW, GaussianMixture, MixtureExperts, generate

from diffusers_dmp import ClassTarget, GuidedScheduler

MIXTURE = GaussianMixture.random(5, (1, 2, 2), seed=28)
HARDEST = 3  # of its classes: 98.1 % of its samples are recognised
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EULER, HEUN, UNIPC = "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "UniPCMultistep"
DPM, SINGLESTEP, DEIS = "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"
SHIFTED_BY_SIZE = ({"use_dynamic_shifting": True}, {"mu": 1.15})  # settings, and what `set_timesteps` gets


def make(name: str, **settings: Any) -> SchedulerMixin:
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    flow = {} if name.startswith("Flow") or name == "LTXEulerAncestralRF" else FLOW_SIGMAS
    return scheduler_class(**flow | settings)


def guided(
    scheduler: SchedulerMixin, noise_schedule: dict | None = None, label: int = HARDEST, **settings: Any
) -> GuidedScheduler:
    experts = MixtureExperts(MIXTURE, noise_schedule or FLOW)
    return GuidedScheduler(scheduler, experts, ClassTarget(label), **{"scale": 1.0} | settings)


# One step: the velocity of all classes, guided with scale 1 by the exact classifier, is that of the class.

SCHEDULES = [
    (EULER, {}, {}),
    (EULER, {"shift": 3.0}, {}),
    (EULER, *SHIFTED_BY_SIZE),
    (EULER, {"shift_terminal": 0.1}, {}),
    (EULER, {"use_karras_sigmas": True}, {}),
    (EULER, {"use_exponential_sigmas": True}, {}),
    (EULER, {"use_beta_sigmas": True}, {}),
    (EULER, {"invert_sigmas": True}, {}),
    (EULER, {"num_train_timesteps": 1}, {"sigmas": [1 - step / 12 for step in range(12)]}),  # it counts from 0 to 1
    (EULER, {"num_train_timesteps": 500}, {}),
    (HEUN, {}, {}),
    (UNIPC, {"flow_shift": 5.0}, {}),
    (UNIPC, {"use_karras_sigmas": True}, {}),
    (DPM, *SHIFTED_BY_SIZE),
    (SINGLESTEP, {}, {}),
    (DEIS, {}, {}),
    ("LTXEulerAncestralRF", {}, {}),
    ("FlowMapEulerDiscrete", {"shift": 3.0}, {}),
    ("FlowMatchLCM", {}, {}),
    ("SASolver", {}, {}),
]


def guided_velocities(scheduler: GuidedScheduler, position: int, velocity: torch.Tensor, x_t: torch.Tensor) -> Any:
    """The velocity that the scheduler's own step is given, in float64: the step itself would round it to float32."""
    scheduler.set_begin_index(position)
    seen = []
    scheduler._guided_step(lambda model_output, timestep, sample: seen.append(model_output), velocity, None, x_t)
    return seen[0]


def assert_close(velocity: torch.Tensor, expected: torch.Tensor) -> None:
    assert ((velocity - expected).norm() / expected.norm()).item() < 1e-10


@pytest.mark.parametrize("noise_schedule", [FLOW, DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize(("name", "settings", "schedule"), SCHEDULES)
def test_the_guided_velocity_is_that_of_the_class(name, settings, schedule, noise_schedule):
    scheduler = guided(make(name, **settings), noise_schedule, label=2, timestep_range=(0, 1000))
    scheduler.set_timesteps(12, **schedule)
    x_t = MIXTURE.sample(torch.arange(5)) + torch.randn(5, 1, 2, 2, dtype=torch.float64)
    sign = -1 if settings.get("invert_sigmas") else 1  # Mochi's velocity is x0 - ε
    compared = 0
    for position in range(len(scheduler.timesteps)):
        sigma = scheduler.sigmas[position].double()
        sigma = 1 - sigma if settings.get("invert_sigmas") else sigma
        begins_with_an_image = scheduler.sigmas[position // scheduler.order * scheduler.order] < 1
        if 0.02 < sigma < 0.998 and begins_with_an_image:
            velocity = guided_velocities(scheduler, position, sign * MIXTURE.velocity(x_t, sigma), x_t)
            assert_close(sign * velocity, MIXTURE.velocity(x_t, sigma, label=2))
            compared += 1
    assert compared >= 4


def test_packed_latents():
    """(B, N, C), as Flux and Qwen-Image have them; the decoder sees x̂0 = x_t - σ·v, a function of x_t."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas[5].double()
    x_t = MIXTURE.sample(torch.arange(3)) + torch.randn(3, 1, 2, 2, dtype=torch.float64)
    velocity = MIXTURE.velocity(x_t, sigma)

    def pack(latents):
        return latents.flatten(2).transpose(1, 2)

    def decode(latents):
        assert latents.shape == (3, 4, 1)
        return latents.transpose(1, 2).unflatten(2, (2, 2)) + sigma * velocity  # x_t, of which the classifier is known

    scheduler = guided(scheduler, label=2, decoder=decode)
    scheduler.set_timesteps(10)
    packed = guided_velocities(scheduler, 5, pack(velocity), pack(x_t))
    assert_close(packed, pack(MIXTURE.velocity(x_t, sigma, label=2)))


@pytest.mark.parametrize("decoded", [False, True])
def test_videos(decoded):
    """
    (B, C, F, H, W), each frame of its own class before it is guided. The target is the mean over the frames, so that a scale of
    F is that of an independent classifier for each.
    """

    def frames(videos):
        return videos.transpose(1, 2).flatten(0, 1)

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas[5].double()
    x_t = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    velocity, expected = (
        MIXTURE.velocity(frames(x_t), sigma, label).unflatten(0, (2, 3)).transpose(1, 2) for label in (None, 2)
    )
    decoder = (lambda latents: (latents + sigma * velocity).transpose(1, 2)) if decoded else None
    scheduler = guided(scheduler, label=2, scale=3, decoder=decoder)
    scheduler.set_timesteps(10)
    assert_close(guided_velocities(scheduler, 5, velocity, x_t), expected)


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [(make(UNIPC), {"num_inference_steps": 12}), (make(EULER, num_train_timesteps=1), SCHEDULES[8][2])],
    ids=["timesteps to 1000", "timesteps to 1"],
)
def test_networks_of_different_processes(scheduler, schedule):
    """Each a part of the guidance, in one scheduler around another: each is told its own timestep."""
    shorter = MixtureExperts(MIXTURE, FLOW | {"num_train_timesteps": 100}, num_train_timesteps=100)
    first = GuidedScheduler(scheduler, shorter, ClassTarget(2), scale=0.25)
    second = guided(first, label=2, scale=0.25)
    third = guided(second, DDPM, label=2, scale=0.5)
    third.set_timesteps(**schedule)
    sigma = third.sigmas[6].double()
    x_t = MIXTURE.sample(torch.arange(5)) + torch.randn(5, 1, 2, 2, dtype=torch.float64)
    guided_velocity = guided_velocities(third, 6, MIXTURE.velocity(x_t, sigma), x_t)
    assert_close(guided_velocity, MIXTURE.velocity(x_t, sigma, label=2))
    assert shorter.seen == [pytest.approx(sigma.item() * 100)] and second.experts.seen == [
        pytest.approx(sigma.item() * 1000)
    ]


# Whole trajectories: 4,000 samples, one in five of the class


DETERMINISTIC = [
    (EULER, {}, {}),
    (EULER, {"shift": 3.0}, {}),
    (EULER, *SHIFTED_BY_SIZE),
    (HEUN, {}, {}),
    (UNIPC, {}, {}),
    (DPM, {}, {}),
    (SINGLESTEP, {}, {}),
    (DEIS, {}, {}),
]
STOCHASTIC = [("SASolver", {}, {}), ("LTXEulerAncestralRF", {}, {}), ("FlowMatchLCM", {}, {})]


def share_of(samples: torch.Tensor, label: int = HARDEST) -> float:
    return MIXTURE.share_of(samples, label)


def test_how_many_are_recognised_without_guidance():
    shares = [share_of(MIXTURE.sample(torch.full((4000,), label)), label) for label in range(5)]
    assert min(shares) == shares[HARDEST] == pytest.approx(0.98, abs=0.004)
    assert share_of(generate(MIXTURE, make(UNIPC))) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("name", "settings", "schedule"), DETERMINISTIC + STOCHASTIC)
def test_samples_are_of_the_class_that_is_asked_for(name, settings, schedule):
    assert share_of(generate(MIXTURE, guided(make(name, **settings)), **schedule)) >= 0.97


class Unmatched(MixtureExperts):
    """Experts that are shown x_t as it is, at t = σ·T."""

    def __init__(self, noise_schedule: dict):
        super().__init__(MIXTURE, noise_schedule)
        self.trained, self.process = self.process, None

    def _levels(self, t):
        self.process = self.trained
        levels = super()._levels(t)
        self.process = None
        return levels


def samples_by(scheduler: SchedulerMixin, experts: MixtureExperts) -> torch.Tensor:
    return generate(MIXTURE, GuidedScheduler(scheduler, experts, ClassTarget(HARDEST), scale=1.0))


def test_experts_trained_with_ddpm_guide_a_flow_model_as_its_own_do():
    own, other = (samples_by(make(UNIPC), MixtureExperts(MIXTURE, noise)) for noise in (FLOW, DDPM))
    assert share_of(other) == pytest.approx(share_of(own), abs=0.01) and share_of(own) >= 0.97
    torch.testing.assert_close(other, own, atol=1e-3, rtol=0)
    assert share_of(samples_by(make(UNIPC), Unmatched(DDPM))) < 0.9


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_experts_trained_on_flow_matching_guide_a_ddpm_model_as_its_own_do(name):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config({"clip_sample": False})
    own, other = (samples_by(scheduler, MixtureExperts(MIXTURE, noise)) for noise in (DDPM, FLOW))
    assert share_of(other) == pytest.approx(share_of(own), abs=0.01)
    assert share_of(own) >= (0.8 if name == "DDPM" else 0.97)  # its mean is guided right for many steps only
    assert (other.std(0) / own.std(0)).mean().item() == pytest.approx(1, abs=0.01)
    unmatched = samples_by(scheduler, Unmatched(FLOW))
    assert (unmatched.std(0) / own.std(0)).mean().item() < 0.8  # guided by much too much


class CleanClassifier(MixtureExperts):
    """The classifier of clean samples, shown x_t: its gradient does not vanish where there is nothing but noise."""

    def _levels(self, t):
        return torch.ones(()), torch.zeros(())


def test_by_default_steps_near_pure_noise_are_not_guided():
    """There the gradient of a classifier that does not know noise pushes samples far out of their class."""

    def farthest(timestep_range: tuple[float, float] | None) -> float:
        experts = CleanClassifier(MIXTURE, FLOW)
        scheduler = GuidedScheduler(
            make(UNIPC), experts, ClassTarget(HARDEST), scale=1.0, timestep_range=timestep_range
        )
        samples = generate(MIXTURE, scheduler, steps=28)
        distances = (samples - MIXTURE.means[HARDEST]).flatten(1).norm(dim=1)
        assert share_of(samples) >= 0.97
        return distances.quantile(0.95).item()

    of_the_class = MIXTURE.sample(torch.full((4000,), HARDEST)) - MIXTURE.means[HARDEST]
    spread = of_the_class.flatten(1).norm(dim=1).quantile(0.95).item()
    assert farthest(None) < 4 * spread < 5.5 * spread < farthest((0, 1001))
