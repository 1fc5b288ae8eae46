"""How denoisers are told the time, in their real pipelines."""

import diffusers
import pytest
import torch
from diffusers import models as diffusers_models
from hypothesis import given
from hypothesis import strategies as st
from packaging import version
from tiny_pipelines import RECIPES, generate, wan, wan_pipe
from torch import nn

from diffusers_dmp import NoiseIntervals, TimeArgument, register_time_argument
from diffusers_dmp.models import time_argument as table
from diffusers_dmp.models.time_argument import ExpertFinder, time_argument_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FRACTION = TimeArgument(at_pure_noise=1.0)
ARGUMENTS = (
    TimeArgument(),
    FRACTION,
    TimeArgument(at_pure_noise=1.0, flipped=True),
    TimeArgument(flipped=True),
    TimeArgument(offset=-1.0),
)

# Parts of denoisers rather than denoisers, and one whose two pipelines differ: the first call is looked at.
BY_DEFAULT = {
    "DreamLiteTransformer2DModel",
    "DualTransformer2DModel",
    "MiniMaxMusic3RVQDepthDecoder",
    "MotionAdapter",
    "T5FilmDecoder",
    "Transformer2DModel",
    "TransformerTemporalModel",
    "UNet1DModel",
}
LISTED = {name: getattr(diffusers, name) for name in table._DIFFUSERS if hasattr(diffusers, name)}


class Told:
    """What a denoiser was called with, at each call."""

    def __init__(self, denoiser: nn.Module):
        self.calls: list[tuple[tuple, dict]] = []
        self.denoiser = denoiser
        denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )

    def timesteps(self) -> list[float]:
        finder = ExpertFinder(self.denoiser, NoiseIntervals((0, 1000)))
        values = [finder.value(args, kwargs) for args, kwargs in self.calls]
        return [finder.argument.timesteps(value, 1000).max().item() for value in values]


@pytest.mark.parametrize("name", RECIPES)
def test_the_time_of_each_pipeline_is_its_scheduler_s(name):
    denoiser = RECIPES[name].denoiser()
    told = Told(denoiser)
    pipe = RECIPES[name].pipe(denoiser)
    generate(name, pipe, num_inference_steps=3)
    calls_per_step = len(told.calls) // 3
    timesteps = told.timesteps()[::calls_per_step]
    assert timesteps == pytest.approx(pipe.scheduler.timesteps.tolist(), abs=1e-3)


def test_per_token_time_is_that_of_the_noisiest_token():
    denoiser = wan()
    told = Told(denoiser)
    pipe = wan_pipe(denoiser, expand_timesteps=True)
    generate("wan", pipe, num_inference_steps=3)
    args, kwargs = told.calls[0]
    assert kwargs["timestep"].ndim == 2
    assert told.timesteps()[::2] == pipe.scheduler.timesteps.tolist()


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(boundary=st.integers(1, 999))
def test_a_step_on_a_boundary_belongs_to_the_expert_above(argument, dtype, boundary):
    denoiser = _taught(argument)
    finder = ExpertFinder(denoiser, NoiseIntervals.from_timesteps([boundary]))
    # as Flux and Qwen-Image round: before the unit is changed; and after
    for value in (
        argument.told(torch.tensor([float(boundary)]).to(dtype), 1000),
        argument.told(torch.tensor([float(boundary)]), 1000).to(dtype),
    ):
        assert finder((), {"timestep": value}) == [1]


@given(st.sampled_from(ARGUMENTS), st.lists(st.floats(0, 1000), min_size=1, max_size=5))
def test_what_is_told_is_read_back(argument, timesteps):
    timesteps = torch.tensor(timesteps, dtype=torch.float64)
    torch.testing.assert_close(argument.timesteps(argument.told(timesteps, 1000), 1000), timesteps, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_known_schedule_decides_what_rounding_hides(dtype):
    finder = ExpertFinder(_taught(FRACTION), NoiseIntervals.from_timesteps([900]))
    schedule = torch.tensor([1000.0, 899.9, 500.0])
    told = schedule.to(dtype) / 1000
    owners = [finder((), {"timestep": value}, schedule) for value in told]
    assert owners == [[1], [0], [0]]
    # what is not of that schedule, as in a validation during training, still knows the boundary
    on_boundary = torch.tensor(900.0).to(dtype) / 1000
    assert finder((), {"timestep": on_boundary}, torch.tensor([1000.0, 500.0])) == [1]


def test_mixed_batches_have_one_expert_each():
    finder = ExpertFinder(_taught(FRACTION), NoiseIntervals.from_sigmas([0.25, 0.5]))
    assert finder((), {"timestep": torch.tensor([0.1, 0.9, 0.3])}) == [0, 2, 1]
    assert finder((), {"timestep": torch.tensor([0.9, 0.8])}) == [2]


def test_given_tokens_belong_to_nobody_and_others_must_agree():
    finder = ExpertFinder(wan(), NoiseIntervals.from_sigmas([0.5]))
    given_first = torch.tensor([[0, 0, 900, 900]])
    assert finder((), {"timestep": given_first}) == [1]
    with pytest.raises(ValueError, match="all noisy tokens of a sample to belong to one expert"):
        finder((), {"timestep": torch.tensor([[100, 900]])})


def test_every_denoiser_of_diffusers_is_listed_or_left_to_the_default_knowingly():
    lists = diffusers_models._import_structure.items()
    exported = {name for module, names in lists if module.startswith(("transformers.", "unets.")) for name in names}
    known = table._DIFFUSERS.keys() | table._TIME_OF_ITS_OWN | BY_DEFAULT
    if version.parse(diffusers.__version__) < version.parse("0.43.0.dev0"):  # a newer one may have others
        assert exported <= known
    assert not table._DIFFUSERS.keys() & table._TIME_OF_ITS_OWN
    assert len(table._DIFFUSERS) == sum(len(names.split()) for _, names in table._CONVENTIONS)


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_class_has_the_argument_and_is_verified(name):
    names = table._argument_names(LISTED[name])
    convention = table._known_argument(LISTED[name])
    arguments = [convention({}), convention({"guidance_embeds": True})] if callable(convention) else [convention]
    assert all(argument.name in names for argument in arguments)


@pytest.mark.parametrize("name", sorted(table._TIME_OF_ITS_OWN))
def test_a_class_with_a_time_of_its_own_is_refused_until_it_is_taught(name, monkeypatch):
    if not hasattr(diffusers, name):
        pytest.skip("another version of Diffusers")
    denoiser = getattr(diffusers, name).__new__(getattr(diffusers, name))
    with pytest.raises(ValueError, match=f"of which is known how it is told the time, but got a {name}; teach it"):
        time_argument_of(denoiser)
    monkeypatch.setattr(table, "_REGISTERED", {})
    argument = TimeArgument(name=table._argument_names(type(denoiser))[1], at_pure_noise=1.0)
    register_time_argument(type(denoiser), argument)
    assert time_argument_of(denoiser) == argument


def test_sana_is_told_in_the_unit_of_its_configuration():
    assert table._sana({"timestep_scale": 1.0, "guidance_embeds": False}) == TimeArgument()
    assert table._sana({}) == TimeArgument()
    scaled = table._sana({"timestep_scale": 0.001})
    assert scaled.timesteps(torch.tensor([0.7]), 1000).item() == pytest.approx(700)
    assert table._sana({"guidance_embeds": True}) == FRACTION  # Sana-Sprint


def test_glm_image_is_told_one_timestep_less():
    argument = table._DIFFUSERS["GlmImageTransformer2DModel"]
    assert argument.timesteps(torch.tensor([999.0, 499.0, 0.0]), 1000).tolist() == [1000, 500, 1]


@pytest.mark.parametrize("total", [10, 500, 4000])
def test_other_numbers_of_training_timesteps(total):
    intervals = NoiseIntervals.from_timesteps([total / 2], total)
    for argument in ARGUMENTS:
        finder = ExpertFinder(_taught(argument), intervals)
        told = argument.told(torch.tensor([total, total / 2, total / 2 - 1]), total)
        assert [finder((), {"timestep": value}) for value in told] == [[1], [1], [0]]
    with pytest.raises(ValueError, match=f"{total} training timesteps"):
        ExpertFinder(UsualTime(), intervals)((), {"timestep": torch.tensor(total + 1.0)})


@pytest.mark.parametrize("value", [875, 875.0, torch.tensor(875), torch.tensor([875.0]), torch.tensor([[875]])])
def test_numbers_and_tensors_of_one_element_are_told_alike(value):
    finder = ExpertFinder(wan(num_layers=1), NoiseIntervals.from_sigmas([0.875]))
    assert finder((), {"timestep": value}) == [1]
    assert finder((None, value), {}) == [1]  # by position


@pytest.mark.parametrize("kwargs", [{}, {"timestep": None}, {"timestep": torch.tensor([])}])
def test_a_call_without_the_time_is_refused(kwargs):
    finder = ExpertFinder(UsualTime(), NoiseIntervals.from_sigmas([0.5]))
    with pytest.raises(ValueError, match="Expected UsualTime to be called with `timestep`, but got none"):
        finder((), kwargs)


def test_only_classes_that_are_told_per_token_take_it():
    finder = ExpertFinder(RECIPES["sd3"].denoiser(), NoiseIntervals.from_sigmas([0.5]))
    with pytest.raises(ValueError, match="one value for each sample, but got the shape"):
        finder((), {"timestep": torch.tensor([[100.0, 900.0]])})


class OwnTime(nn.Module):
    def forward(self, sample: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        return sample


class UsualTime(nn.Module):
    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample


def test_an_unknown_class_is_refused_until_it_is_taught():
    with pytest.raises(ValueError, match=r"but got a OwnTime; teach it with `register_time_argument\(OwnTime"):
        time_argument_of(OwnTime())
    with pytest.raises(ValueError, match="an argument of OwnTime's `forward`, sample, log_sigma, but got 'time'"):
        register_time_argument(OwnTime, TimeArgument(name="time"))
    argument = TimeArgument(name="log_sigma", at_pure_noise=1.0)
    register_time_argument(OwnTime, argument)
    assert time_argument_of(OwnTime()) == argument


def test_a_fraction_is_not_taken_for_a_timestep():
    finder = ExpertFinder(UsualTime(), NoiseIntervals.from_sigmas([0.5]))
    with pytest.raises(ValueError, match=r"but got 0.9 in the first call, which looks like a fraction"):
        finder((), {"timestep": torch.tensor([0.9])})
    assert finder((), {"timestep": torch.tensor([900.0])}) == [1]
    assert finder((), {"timestep": torch.tensor([0.5])}) == [0]  # the last step


def _taught(argument: TimeArgument) -> nn.Module:
    denoiser = UsualTime()
    denoiser.__class__ = type("Taught", (UsualTime,), {"forward": UsualTime.forward})
    register_time_argument(type(denoiser), argument)
    return denoiser
