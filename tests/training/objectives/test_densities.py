"""Densities over noise levels: their shares, their truncation, and who owns what is sampled from them."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_dmp import NoiseIntervals, TimeArgument, register_time_argument
from diffusers_dmp.diffusion.timesteps import training_timesteps
from diffusers_dmp.models.time_argument import ExpertFinder
from diffusers_dmp.training.objectives.densities import (
    DENSITIES,
    MIN_SHARE,
    MIN_TRUNCATED_SHARE,
    MODE_SCALES,
    NoiseDensity,
    owned_timesteps,
)
from diffusers_dmp.training.objectives.shifts import ResolutionShift, parsed_shift, shifted

DOCS = REPOSITORY / "docs" / "flow_matching.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


class ToldTime(nn.Module):
    """t from T to 0, as SD3 and Wan."""

    argument = TimeArgument()

    def forward(self, x_t, timestep):
        raise NotImplementedError


class ToldFraction(ToldTime):
    """As Flux and Qwen-Image."""

    argument = TimeArgument(at_pure_noise=1.0)


class ToldFlippedFraction(ToldTime):
    """As Z-Image and Lumina2."""

    argument = TimeArgument(at_pure_noise=1.0, flipped=True)


class ToldFlippedTime(ToldTime):
    """As Mochi."""

    argument = TimeArgument(flipped=True)


class ToldOneLess(ToldTime):
    """As GLM-Image."""

    argument = TimeArgument(offset=-1.0)


class ToldScaledTime(ToldTime):
    """As Sana with a `timestep_scale`."""

    argument = TimeArgument(at_pure_noise=250.0)


CONVENTIONS = (ToldTime, ToldFraction, ToldFlippedFraction, ToldFlippedTime, ToldOneLess, ToldScaledTime)
for each in CONVENTIONS:
    register_time_argument(each, each.argument)

densities = st.builds(
    NoiseDensity,
    name=st.sampled_from(DENSITIES),
    logit_mean=st.floats(-1, 1),
    logit_std=st.floats(0.5, 2),
    mode_scale=st.floats(*MODE_SCALES),
    shift=st.floats(0.2, 15),
)


@st.composite
def noise_intervals(draw) -> NoiseIntervals:
    """Intervals with edges anywhere, such as 142.857…, or at whole timesteps; some so short that their edges are everywhere."""
    total = draw(st.sampled_from([1000, 100, 4000]))
    inner = st.floats(0.02, 0.98) | st.integers(1, 49).map(lambda part: part / 50) | st.just(1 / 7)
    first, length = draw(inner), draw(st.floats(2e-5, 1e-3) | st.floats(1e-3, 0.5))
    return NoiseIntervals.from_sigmas([first, first + length] if first + length < 0.99 else [first], total)


def finder(convention: type[nn.Module], intervals: NoiseIntervals) -> ExpertFinder:
    return ExpertFinder(convention(), intervals)


def owners_of(intervals: NoiseIntervals, batch_size: int = 64) -> torch.Tensor:
    """Every expert, in turn."""
    return torch.arange(batch_size) % intervals.num_experts


def owners_told(found: list[int], batch_size: int) -> list[int]:
    """A finder says one expert for a whole batch."""
    return found * batch_size if len(found) == 1 else found


@settings(max_examples=60)
@given(densities, noise_intervals(), st.sampled_from(CONVENTIONS), st.integers(0, 2**32 - 1))
def test_a_sample_belongs_to_the_expert_that_it_trains(density, intervals, convention, seed):
    """By the rule itself, and by what any denoiser makes of the time that it is told."""
    assume(min(density.shares(intervals)) > MIN_TRUNCATED_SHARE)
    owners = owners_of(intervals)
    timesteps = density.sample(intervals, owners, torch.Generator().manual_seed(seed))
    assert timesteps.dtype == torch.float32
    assert torch.equal(intervals.index(timesteps), owners)
    told = convention.argument.told(timesteps, intervals.num_train_timesteps)
    found = finder(convention, intervals)((), {"timestep": told})
    assert owners_told(found, len(owners)) == owners.tolist()


@settings(max_examples=40)
@given(densities, noise_intervals(), st.sampled_from(CONVENTIONS), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_a_sampling_gives_each_noise_level_to_the_expert_that_trained_it(density, intervals, convention, dtype, seed):
    """A scheduler that visits the noise levels of a training batch, in whatever dtype the pipeline tells the time."""
    assume(min(density.shares(intervals)) > MIN_TRUNCATED_SHARE)
    total = intervals.num_train_timesteps
    owners = owners_of(intervals, 12)
    timesteps = density.sample(intervals, owners, torch.Generator().manual_seed(seed))
    timesteps, order = timesteps.sort(descending=True)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=total, shift=density.shift)
    unshifted = shifted(timesteps.double() / total, 1 / density.shift)  # the scheduler shifts them itself
    scheduler.set_timesteps(sigmas=unshifted.tolist())
    schedule, find = training_timesteps(scheduler, total), finder(convention, intervals)
    for step, owner in enumerate(owners[order].tolist()):
        exact = schedule[step]
        rounded_before = convention.argument.told(exact.to(dtype), total)
        rounded_after = convention.argument.told(exact, total).to(dtype)
        for told in (rounded_before, rounded_after):
            assert find((), {"timestep": told.expand(2)}, schedule, step) == [owner]


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.02])
@pytest.mark.parametrize(
    "scheduler_class",
    [
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
        DEISMultistepScheduler,
    ],
)
def test_every_schedulers_steps_go_to_the_expert_that_owns_them(scheduler_class, shift):
    """Those that a scheduler chooses itself; UniPC and its kin tell whole timesteps."""
    flow = "FlowMatch" in scheduler_class.__name__
    scheduler = scheduler_class(shift=shift) if flow else scheduler_class(**FLOW_SIGMAS, flow_shift=shift)
    scheduler.set_timesteps(17)
    schedule, intervals = training_timesteps(scheduler, 1000), NoiseIntervals.from_sigmas([0.3, 0.5, 0.875])
    expected = [sum(t >= edge for edge in (300, 500, 875)) for t in schedule.tolist()]
    for convention in CONVENTIONS:
        find = finder(convention, intervals)
        told = [convention.argument.told(t, 1000) for t in schedule]
        for dtype in DTYPES:
            rounded = [t.to(dtype) if t.is_floating_point() else t for t in told]
            assert [find((), {"timestep": t}, schedule, step)[0] for step, t in enumerate(rounded)] == expected


@given(densities)
def test_the_quantile_function_and_the_distribution_function_are_inverse(density):
    share = torch.linspace(0, 1, 257, dtype=torch.float64)
    sigma = density.quantile(share)
    assert sigma[0] == 0 and sigma[-1] == 1 and (sigma.diff() >= 0).all()
    torch.testing.assert_close(density.cdf(sigma), share, atol=1e-9, rtol=0)


SETTINGS = {"logit_mean": 0.4, "logit_std": 1.2, "mode_scale": 1.29}


def published(name: str, shift: float, count: int) -> torch.Tensor:
    """Noise levels of a whole density, from Diffusers' training utilities or the paper, shifted as schedulers do."""
    generator = torch.Generator().manual_seed(1)
    sigma = compute_density_for_timestep_sampling(name, count, **SETTINGS, generator=generator).double()
    if name == "cosmap":  # which is a weighting there: 1 - 1 / (tan(πu/2) + 1) (SD3, equation 21)
        sigma = 1 - 1 / (torch.tan(math.pi / 2 * sigma) + 1)
    return shift * sigma / (1 + (shift - 1) * sigma)


def kolmogorov_smirnov(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference between two samples' distribution functions."""
    first, second = first.double().sort().values, second.double().sort().values
    points = torch.cat([first, second])
    shares = [torch.searchsorted(each, points, right=True) / len(each) for each in (first, second)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", DENSITIES)
def test_truncation_is_rejection_without_the_rejected(name, shift):
    density = NoiseDensity(name=name, shift=shift, **SETTINGS)
    intervals = NoiseIntervals.from_sigmas([0.4, 0.8])
    sigma = published(name, shift, 800_000)
    for expert, (low, high) in enumerate([(0.0, 0.4), (0.4, 0.8), (0.8, 1.0)]):
        rejected = sigma[(sigma >= low) & (sigma < high)]
        owners = torch.full((50_000,), expert)
        timesteps = density.sample(intervals, owners, torch.Generator().manual_seed(0))
        assert kolmogorov_smirnov(timesteps / 1000, rejected) <= 0.0125
        other = replace(density, shift=10 * shift).sample(intervals, owners)
        assert kolmogorov_smirnov(other / 1000, rejected) > 0.0125  # which is not any density


@pytest.mark.parametrize("name", DENSITIES)
def test_a_whole_density_is_the_published_one(name):
    everyone, all_of_it = torch.zeros(50_000, dtype=torch.long), NoiseIntervals.uniform(1)
    sample = NoiseDensity(name=name, **SETTINGS).sample(all_of_it, everyone, torch.Generator().manual_seed(0))
    assert kolmogorov_smirnov(sample / 1000, published(name, 1.0, 100_000)) <= 0.0125


@pytest.mark.parametrize("name", DENSITIES)
def test_the_shares_above_the_boundary_of_wan(name):
    """As docs/flow_matching.md says them."""
    (row,) = (line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}`"))
    written = [float(cell.removesuffix(" %")) / 100 for cell in row.strip("| ").split(" | ")[-4:]]
    for shift, share in zip((1.0, 3.0, 5.0, 12.0), written):
        density = NoiseDensity(name=name, shift=shift)
        assert density.probability(0.875, 1.0) == pytest.approx(share, abs=5.1e-4)
        assert density.shares(NoiseIntervals.from_sigmas([0.875])) == pytest.approx([1 - share, share], abs=5.1e-4)


@pytest.mark.parametrize("name, shift, share", [("uniform", 1.0, 0.125), ("logit_normal", 1.0, 0.026),
                                                ("logit_normal", 5.0, 0.368), ("logit_normal", 12.0, 0.705)])  # fmt: skip
def test_known_shares(name, shift, share):
    assert NoiseDensity(name=name, shift=shift).probability(0.875, 1.0) == pytest.approx(share, abs=5e-4)


def test_an_expert_without_noise_levels_is_named():
    density, intervals = NoiseDensity(name="logit_normal"), NoiseIntervals.from_sigmas([0.3, 0.99])
    with pytest.raises(ValueError, match=r"2.16e-06 for expert 2, σ in \[0.99, 1\).*logit_normal.*shift 1"):
        density.check_shares(intervals, min_share=MIN_SHARE)
    density.check_shares(intervals)  # enough to truncate the density to it
    assert intervals.index(density.sample(intervals, torch.tensor([2]))).item() == 2
    beyond = NoiseIntervals.from_sigmas([0.3, 1 - 1e-4])
    density.sample(beyond, torch.tensor([0, 1]))  # the others have their own
    for check in (density.check_shares, lambda intervals: density.sample(intervals, torch.tensor([0, 2]))):
        with pytest.raises(ValueError, match="at least 1e-12 .* got 0 for expert 2"):
            check(beyond)
    with pytest.raises(ValueError, match="longer than 0.0095.* timesteps"):
        NoiseDensity().sample(NoiseIntervals.from_timesteps([500, 500.005]), torch.tensor([1]))


def test_an_interval_without_its_last_bits():
    assert owned_timesteps(0, 1000, 1000) == (0, 1000)
    low, high = owned_timesteps(250, 875, 1000)
    assert 250 < low < 250.005 and 874.995 < high < 875


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "beta"}, "uniform, logit_normal, mode, cosmap.*'beta'"),
        ({"logit_std": 0.0}, "`logit_std`.*0.0"),
        ({"logit_mean": math.nan}, "`logit_mean`.*nan"),
        ({"mode_scale": 2.0}, r"`mode_scale`.*\[-1, 1.752\].*2.0"),
        ({"shift": -1.0}, "`shift`.*-1.0"),
    ],
)
def test_refuses_a_density_that_is_none(settings, message):
    with pytest.raises(ValueError, match=message):
        NoiseDensity(**settings)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("size", [(16, 64, 64), (16, 5, 32, 96)])
def test_a_shift_by_resolution_is_the_schedulers(size, time_shift_type):
    settings = {"base_shift": 0.6, "max_shift": 1.3, "base_image_seq_len": 128, "max_image_seq_len": 8192}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=time_shift_type, **settings)
    tokens = math.prod(size[1:]) // 4
    scheduler.set_timesteps(10, mu=calculate_shift(tokens, 128, 8192, 0.6, 1.3))
    shift = ResolutionShift.of_scheduler(scheduler, patch_size=2)(size)
    evenly = torch.linspace(1, 1 / 1000, 10, dtype=torch.float64)
    torch.testing.assert_close(shifted(evenly, shift).float() * 1000, scheduler.timesteps, atol=1e-3, rtol=1e-5)


def test_a_shift_as_a_user_writes_it():
    assert parsed_shift("3") == parsed_shift(3.0) == 3.0 and parsed_shift("resolution") == "resolution"
    for shift in ("-1", "0", "nan", "dynamic"):
        with pytest.raises(ValueError, match=f"`shift` to be a positive number or 'resolution', but got '{shift}'"):
            parsed_shift(shift)
