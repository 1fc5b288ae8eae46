"""One rule decides which expert owns a timestep, and it holds everywhere."""

import json
import math

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
from diffusers_dmp.intervals import group_by_expert


@st.composite
def uniform_intervals(draw):
    num_train_timesteps = draw(st.integers(1, 3000))
    num_experts = draw(st.integers(1, min(num_train_timesteps, 60)))
    return NoiseIntervals.uniform(num_experts, num_train_timesteps, last_takes_rest=draw(st.booleans()))


@st.composite
def any_intervals(draw):
    """Edges that are no integers and, most of them, not representable in float32, as flow matching has them."""
    num_train_timesteps = draw(st.integers(1, 3000))
    # 997 is prime, and the edges stay far apart compared with the precision of float32
    parts = sorted(draw(st.sets(st.integers(1, 996), max_size=8)))
    return NoiseIntervals((0, *(part * num_train_timesteps / 997 for part in parts), num_train_timesteps))


@given(any_intervals())
def test_edges_ascend_and_bound_every_expert(intervals):
    assert list(intervals.edges) == sorted(set(intervals.edges))
    assert (intervals.edges[0], intervals.edges[-1]) == (0, intervals.num_train_timesteps)
    assert len(intervals.edges) == intervals.num_experts + 1


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=6))
def test_edges_that_do_not_ascend_from_zero_are_refused(edges):
    if edges[0] == 0 and all(low < high for low, high in zip(edges, edges[1:])) and edges[-1] == int(edges[-1]):
        assert NoiseIntervals(edges).edges == tuple(edges)
    else:
        with pytest.raises(ValueError, match="edges"):
            NoiseIntervals(edges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(intervals=any_intervals())
def test_a_float_edge_belongs_to_the_expert_above_it(intervals, dtype):
    edges = torch.tensor(intervals.edges, dtype=dtype)
    experts = torch.arange(intervals.num_experts)
    assert torch.equal(intervals.index(edges[:-1]), experts)
    just_below = torch.nextafter(edges[1:], edges.new_tensor(-1.0))
    assert torch.equal(intervals.index(just_below), experts)
    # pure noise, where flow matching starts
    assert intervals.index(edges[-1]) == intervals.num_experts - 1


@given(any_intervals())
def test_an_integer_timestep_belongs_to_the_expert_whose_edges_surround_it(intervals):
    timesteps = torch.arange(intervals.num_train_timesteps)
    expected = [sum(edge <= t for edge in intervals.edges) - 1 for t in timesteps.tolist()]
    for dtype in (torch.int64, torch.int32):
        assert intervals.index(timesteps.to(dtype)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edges_are_not_rounded_to_half_precision(dtype):
    # the edge 901.5 is 900 or 904 in bfloat16, and 2049 is not representable in either
    timesteps = torch.tensor([900.0, 904.0, 2048.0], dtype=dtype)
    assert NoiseIntervals((0, 901.5, 2049, 3000)).index(timesteps).tolist() == [0, 1, 1]


@given(any_intervals(), st.integers(0, 2**32))
def test_the_expert_of_a_sampled_timestep_is_the_one_it_was_sampled_for(intervals, seed):
    generator = torch.Generator().manual_seed(seed)
    widths = [math.ceil(high) - math.ceil(low) for low, high in zip(intervals.edges, intervals.edges[1:])]
    if min(widths) == 0:
        with pytest.raises(ValueError, match="integer timestep"):
            intervals.sample(0, 4, generator)
        return
    for expert in range(intervals.num_experts):
        timesteps = intervals.sample(expert, 16, generator)
        assert timesteps.dtype == torch.long
        assert (intervals.index(timesteps) == expert).all()
    experts = torch.arange(64) % intervals.num_experts
    assert torch.equal(intervals.index(intervals.sample(experts, 64, generator)), experts)


@given(any_intervals())
def test_survives_a_config(intervals):
    assert NoiseIntervals(json.loads(json.dumps(intervals.to_config()))) == intervals


@given(st.lists(st.integers(0, 7), max_size=32))
def test_grouping_by_expert_is_a_permutation_with_an_inverse(experts):
    experts = torch.tensor(experts, dtype=torch.long)
    order, present, sizes = group_by_expert(experts)
    grouped = experts[order]
    assert torch.equal(grouped, experts.sort().values)
    assert torch.equal(grouped[order.argsort()], experts)
    assert present == sorted(set(experts.tolist()))
    assert sizes == [experts.tolist().count(expert) for expert in present]
    # stable: samples of one expert stay in the order of the batch
    assert all((part.diff() > 0).all() for part in order.split(sizes)) if sizes else len(order) == 0


@given(uniform_intervals())
def test_every_timestep_belongs_to_exactly_one_expert(intervals):
    experts = intervals.index(torch.arange(intervals.num_train_timesteps))
    for expert, (low, high) in enumerate(zip(intervals.edges, intervals.edges[1:])):
        owned = torch.nonzero(experts == expert).flatten()
        assert owned.tolist() == list(range(low, high))


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


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4, unique=True))
def test_snr_intervals_contain_the_signal_to_noise_ratios_between_their_boundaries(boundaries):
    boundaries = sorted(boundaries, reverse=True)
    scheduler = DDPMScheduler()
    snr = scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())
    try:
        intervals = NoiseIntervals.from_snr(boundaries, scheduler)
    except ValueError:
        # refused: two boundaries lie between neighbouring timesteps
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
    # SNR = ((1 - σ) / σ)² = 1 at σ = ½, which is the timestep T/2 for any shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    intervals = NoiseIntervals.from_snr([1.0], scheduler)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[:-1]
    snr = ((1 - sigmas) / sigmas) ** 2
    assert torch.equal(intervals.index(scheduler.timesteps), (snr <= 1).long())
    assert scheduler.timesteps[0] == 1000  # pure noise, beyond the last integer timestep


@given(st.lists(st.integers(1, 999), max_size=4, unique=True).map(sorted))
def test_intervals_name_the_signal_to_noise_ratios_that_make_them(boundaries):
    intervals = NoiseIntervals.from_timesteps(boundaries)
    scheduler = DDPMScheduler()
    assert NoiseIntervals.from_snr(intervals.snr_boundaries(scheduler), scheduler) == intervals
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert NoiseIntervals.from_snr(intervals.snr_boundaries(flow), flow).edges == pytest.approx(intervals.edges)


def test_boundaries_between_whole_timesteps_have_the_ratio_of_the_next():
    scheduler = DDPMScheduler()
    (boundary,) = NoiseIntervals.from_timesteps([249.5]).snr_boundaries(scheduler)
    assert NoiseIntervals.from_snr([boundary], scheduler).edges == (0, 250, 1000)
    with pytest.raises(ValueError, match="contain an integer timestep"):
        NoiseIntervals.from_timesteps([249.2, 249.8]).snr_boundaries(scheduler)


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


def test_refuses_to_sample_from_an_interval_without_integers():
    with pytest.raises(ValueError, match="integer timestep"):
        NoiseIntervals((0, 0.2, 0.4, 10)).sample(1, 4)
    for expert in (5, -1, torch.tensor([0, 5]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="expert"):
            NoiseIntervals.uniform(5).sample(expert, 2)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=5, unique=True).map(sorted))
def test_sigmas_and_timesteps_name_the_same_intervals(boundaries):
    from_sigmas = NoiseIntervals.from_sigmas([boundary / 1000 for boundary in boundaries])
    assert from_sigmas == NoiseIntervals.from_timesteps(boundaries)
    assert from_sigmas.edges == (0, *boundaries, 1000)


@pytest.mark.parametrize("sigmas", [[0.0], [1.0], [875], [-0.1], [0.5, 0.5], [0.9, 0.1]])
def test_sigmas_ascend_between_0_and_1(sigmas):
    with pytest.raises(ValueError, match="Expected `sigmas` to ascend strictly between 0 and 1, but got"):
        NoiseIntervals.from_sigmas(sigmas)


@pytest.mark.parametrize("boundaries", [[0], [1000], [600, 250]])
def test_boundary_timesteps_ascend_between_0_and_the_last(boundaries):
    with pytest.raises(ValueError, match="Expected `boundaries` to ascend strictly between 0 and 1000, but got"):
        NoiseIntervals.from_timesteps(boundaries)
