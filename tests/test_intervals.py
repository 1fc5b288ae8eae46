"""One rule decides which expert owns a timestep, and it holds everywhere."""

import json

import pytest
import torch
from conftest import Vectors
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp import NoiseIntervals


@st.composite
def uniform_intervals(draw):
    num_train_timesteps = draw(st.integers(1, 3000))
    num_experts = draw(st.integers(1, min(num_train_timesteps, 60)))
    return NoiseIntervals.uniform(num_experts, num_train_timesteps, last_takes_rest=draw(st.booleans()))


@given(uniform_intervals())
def test_every_timestep_belongs_to_exactly_one_expert(intervals):
    experts = intervals.index(torch.arange(intervals.num_train_timesteps))
    for expert, (low, high) in enumerate(zip(intervals.edges, intervals.edges[1:])):
        owned = torch.nonzero(experts == expert).flatten()
        assert owned.tolist() == list(range(low, high))


@given(uniform_intervals(), st.data())
def test_training_never_leaves_the_interval_that_inference_assigns(intervals, data):
    expert = data.draw(st.integers(0, intervals.num_experts - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    timesteps = intervals.sample(expert, 64, generator)
    assert timesteps.dtype == torch.long
    assert (intervals.index(timesteps) == expert).all()


@given(uniform_intervals(), st.integers(0, 2**32))
def test_training_may_draw_another_expert_for_each_sample(intervals, seed):
    experts = torch.arange(64) % intervals.num_experts
    timesteps = intervals.sample(experts, 64, torch.Generator().manual_seed(seed))
    assert torch.equal(intervals.index(timesteps), experts)


@given(uniform_intervals(), st.floats(0, 1, width=32))
def test_a_float_timestep_belongs_to_the_expert_of_its_whole_part(intervals, fraction):
    timestep = torch.tensor([fraction * intervals.num_train_timesteps])
    whole = timestep.long().clamp(max=intervals.num_train_timesteps - 1)
    assert torch.equal(intervals.index(timestep), intervals.index(whole))


@given(st.integers(1, 60))
def test_the_last_of_remix_dits_experts_takes_the_rest(num_experts):
    intervals = NoiseIntervals.uniform(num_experts, 1000, last_takes_rest=True)
    timesteps = torch.arange(1000)
    published = (timesteps // (1000 // num_experts)).clamp(max=num_experts - 1)
    assert torch.equal(intervals.index(timesteps), published)


@given(st.integers(1, 60), st.integers(60, 3000))
def test_uniform_intervals_differ_by_one_timestep_at_most(num_experts, num_train_timesteps):
    intervals = NoiseIntervals.uniform(num_experts, num_train_timesteps)
    lengths = {high - low for low, high in zip(intervals.edges, intervals.edges[1:])}
    assert max(lengths) - min(lengths) <= 1


@given(uniform_intervals())
def test_survives_a_config(intervals):
    assert NoiseIntervals(json.loads(json.dumps(intervals.to_config()))) == intervals


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4, unique=True))
def test_snr_intervals_hold_the_signal_to_noise_ratios_they_say(boundaries):
    boundaries = sorted(boundaries, reverse=True)
    scheduler = DDPMScheduler()
    snr = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    try:
        intervals = NoiseIntervals.from_snr(boundaries, scheduler)
    except ValueError:
        # refused, because two boundaries lie between neighbouring timesteps
        owners = torch.stack([snr <= boundary for boundary in boundaries]).sum(0)
        assert len(owners.unique()) < len(boundaries) + 1
        return
    # expert e owns s_e >= SNR > s_{e+1}
    expected = torch.stack([snr <= boundary for boundary in boundaries]).sum(0)
    assert torch.equal(intervals.index(torch.arange(1000)), expected)


@pytest.mark.parametrize("boundaries", ["0.25", "2.0,0.25", "4,1,0.05"])
def test_snr_split_matches_the_published_code(boundaries):
    intervals = NoiseIntervals.from_snr([float(snr) for snr in boundaries.split(",")], DDPMScheduler())
    published = Vectors("diffusion")[f"snr_split.{boundaries}.expert"]
    assert torch.equal(intervals.index(torch.arange(1000)), published)


def test_snr_split_of_a_flow_matching_scheduler():
    # SNR = ((1 - σ) / σ)² = 1 at σ = ½, which is the timestep T/2 whatever the shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    intervals = NoiseIntervals.from_snr([1.0], scheduler)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[:-1]
    snr = ((1 - sigmas) / sigmas) ** 2
    assert torch.equal(intervals.index(scheduler.timesteps), (snr <= 1).long())
    assert scheduler.timesteps[0] == 1000  # pure noise, beyond the last integer timestep


def test_second_order_schedulers_stay_in_range():
    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(25)
    experts = NoiseIntervals.uniform(4).index(scheduler.timesteps)
    assert experts.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("timestep", [-1, 1000, 1000.5, -0.1])
def test_refuses_a_timestep_beyond_the_training_range(timestep):
    with pytest.raises(ValueError, match="1000 training timesteps"):
        NoiseIntervals.uniform(5).index(torch.tensor([timestep]))


def test_refuses_a_scheduler_of_other_training_steps():
    with pytest.raises(ValueError, match="1000.*DDIMScheduler with 500"):
        NoiseIntervals.uniform(5).check_scheduler(DDIMScheduler(num_train_timesteps=500))


@pytest.mark.parametrize("num_experts", [0, 11])
def test_refuses_more_experts_than_timesteps(num_experts):
    with pytest.raises(ValueError, match="num_experts"):
        NoiseIntervals.uniform(num_experts, 10)


@pytest.mark.parametrize("edges", [(0,), (1, 10), (0, 5, 5, 10), (0, 10.5)])
def test_refuses_edges_that_are_no_partition(edges):
    with pytest.raises(ValueError, match="edges"):
        NoiseIntervals(edges)


@pytest.mark.parametrize("boundaries", [[0.25, 2.0], [-1.0], [1e9]])
def test_refuses_snr_boundaries_that_bound_nothing(boundaries):
    with pytest.raises(ValueError, match="boundaries"):
        NoiseIntervals.from_snr(boundaries, DDPMScheduler())


def test_refuses_a_scheduler_without_snr():
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        NoiseIntervals.from_snr([1.0], EDMEulerScheduler())


def test_refuses_to_draw_from_an_interval_without_integers():
    with pytest.raises(ValueError, match="integer timestep"):
        NoiseIntervals((0, 0.2, 0.4, 10)).sample(1, 4)
    for expert in (5, -1, torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="expert"):
            NoiseIntervals.uniform(5).sample(expert, 2)
