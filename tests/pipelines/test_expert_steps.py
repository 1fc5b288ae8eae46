"""Who does what: the experts of the steps are those that the denoiser of a real pipeline finds at its calls."""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_pipelines import RECIPES, generate

from diffusers_dmp import NoiseIntervals, experts_per_step, steps_per_expert
from diffusers_dmp.models.time_argument import ExpertFinder

STEPS = 6


def called_experts(name, intervals, scheduler=None, **call):
    """The experts that a pipeline's denoiser finds at its steps, and the pipeline."""
    denoiser = RECIPES[name].denoiser()
    finder = ExpertFinder(denoiser, intervals)
    calls = []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.extend(finder(args, kwargs)[:1]), with_kwargs=True
    )
    pipe = RECIPES[name].pipe(denoiser)
    pipe.scheduler = scheduler or pipe.scheduler
    generate(name, pipe, STEPS, **call)
    per_step = len(calls) // len(pipe.scheduler.timesteps)  # two calls where guidance makes two
    return calls[::per_step], pipe


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(use_karras_sigmas=True),
        EulerAncestralDiscreteScheduler(),
        HeunDiscreteScheduler(),
        KDPM2DiscreteScheduler(),
        PNDMScheduler(),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_experts_of_a_diffusion_sampling_are_those_of_its_calls(scheduler):
    # HeunDiscreteScheduler's second step goes from one expert to the other: its two calls are made by both
    intervals = NoiseIntervals.from_timesteps([250, 650])
    expected = experts_per_step(intervals, scheduler, STEPS)
    called, pipe = called_experts("sd15", intervals, scheduler)
    assert called == expected
    assert set(expected) == {0, 1, 2}
    assert experts_per_step(intervals, pipe.scheduler) == expected  # of the pipeline's last call


@pytest.mark.parametrize("shift", [1.0, 12.0])
@pytest.mark.parametrize("scheduler_class", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_the_experts_of_a_flow_sampling_are_those_of_its_calls(scheduler_class, shift):
    intervals = NoiseIntervals.from_sigmas([0.5, 0.875])
    scheduler = scheduler_class(shift=shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = experts_per_step(intervals, scheduler, STEPS)
    assert called_experts("sd3", intervals, scheduler)[0] == expected


def test_dynamic_shifting_needs_the_image_s_size():
    intervals = NoiseIntervals.from_sigmas([0.5, 0.7])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=8.0)
    config = scheduler.config
    mu = calculate_shift(
        (64 // 2) ** 2, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    sigmas = np.linspace(1, 1 / STEPS, STEPS)
    expected = experts_per_step(intervals, scheduler, sigmas=sigmas, mu=mu)
    called, pipe = called_experts("flux", intervals, scheduler, height=64, width=64)
    assert called == experts_per_step(intervals, pipe.scheduler) == expected
    assert experts_per_step(intervals, scheduler, STEPS, sigmas=sigmas, mu=0.0) != expected


def test_wan_s_integer_timesteps():
    intervals = NoiseIntervals.from_sigmas([0.875])
    called, pipe = called_experts("wan", intervals)
    assert called == experts_per_step(intervals, RECIPES["wan"].pipe(None).scheduler, STEPS)
    assert steps_per_expert(intervals, pipe.scheduler) == [called.count(0), called.count(1)]


@given(st.floats(0.2, 20), st.integers(1, 40), st.sets(st.integers(1, 999), max_size=3))
def test_the_counts_are_those_of_the_noise_levels(shift, steps, boundaries):
    intervals = NoiseIntervals.from_timesteps(sorted(boundaries))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = steps_per_expert(intervals, scheduler, steps)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assume(
        all(abs(t - edge) > 5e-3 or t == edge for t in timesteps for edge in boundaries)
    )  # what float32 cannot tell apart
    owners = [sum(t >= edge for edge in boundaries) for t in timesteps]
    assert counts == [owners.count(expert) for expert in range(intervals.num_experts)]


def test_schedulers_that_count_in_another_way_have_the_same_experts():
    intervals = NoiseIntervals.from_sigmas([0.3, 0.8])
    expected = experts_per_step(intervals, FlowMatchEulerDiscreteScheduler(), 10)
    assert experts_per_step(intervals, FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), sigmas=_sigmas(10)) == (
        experts_per_step(intervals, FlowMatchEulerDiscreteScheduler(), sigmas=_sigmas(10))
    )
    # Mochi's sigmas count from 0
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    assert experts_per_step(intervals, inverted, 10) == expected
    assert expected == sorted(expected, reverse=True)


def test_the_scheduler_is_not_changed():
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(7)
    before = copy.deepcopy(scheduler.__dict__)
    experts_per_step(NoiseIntervals.from_sigmas([0.5]), scheduler, 20)
    assert scheduler.__dict__.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(scheduler.__dict__[name], value) if isinstance(value, torch.Tensor) else None
        assert same or scheduler.__dict__[name] == value


def test_an_expert_without_steps_is_warned_of():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    message = (
        r"make some of the 4 steps of FlowMatchEulerDiscreteScheduler, but got none for expert 0 \(t from 0 to 20, σ from 0 "
        r"to 0.02\), expert 2 \(t from 950 to 970, σ from 0.95 to 0.97\)"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        assert steps_per_expert(NoiseIntervals.from_sigmas([0.02, 0.95, 0.97]), scheduler, 4) == [0, 3, 0, 1]
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="more steps, a smaller shift or other boundaries would help"):
        experts_per_step(NoiseIntervals.from_sigmas([0.02]), scheduler, 4)
    with pytest.warns(UserWarning, match="more steps, a larger shift or other boundaries would help"):
        experts_per_step(NoiseIntervals.from_sigmas([0.9]), FlowMatchEulerDiscreteScheduler(), sigmas=[0.8, 0.4])
    with pytest.warns(UserWarning, match=r"expert 1 \(t from 990 to 1000, σ from 1 to 1\); more steps or other"):
        experts_per_step(NoiseIntervals.from_timesteps([990]), DDIMScheduler(), 4)


def test_schedulers_without_training_timesteps_are_refused():
    intervals = NoiseIntervals.from_sigmas([0.5])
    with pytest.raises(ValueError, match="but got a EDMEulerScheduler, which has a time of its own"):
        experts_per_step(intervals, EDMEulerScheduler(), 5)
    with pytest.raises(ValueError, match="1000, but got a DDIMScheduler with 500"):
        experts_per_step(intervals, DDIMScheduler(num_train_timesteps=500), 5)
    with pytest.raises(ValueError, match="or a scheduler whose timesteps are set, but got a DDIMScheduler"):
        experts_per_step(intervals, DDIMScheduler())


def _sigmas(steps):
    return np.linspace(1, 1 / steps, steps).tolist()
