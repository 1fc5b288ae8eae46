"""What noise experts cost on an accelerator, seen on a pretended one: how often the CPU waits for it, and its memory."""

import copy

import pytest
import torch
from accelerate import cpu_offload_with_hook
from peft import LoraConfig
from tiny_pipelines import RECIPES, flux, generate, randn, sd3, wan
from torch import nn

from diffusers_dmp import DenoiserExperts, LoraExperts, NoiseIntervals, TaskRouting
from diffusers_dmp.models.time_argument import ExpertFinder

INTERVALS = NoiseIntervals.from_sigmas([0.875])
HALVES = NoiseIntervals.from_sigmas([0.5])  # of which both occur in three steps
COPY = "aten._to_copy.default"
DENOISERS = {"sd3": sd3, "flux": flux, "wan": wan}


def inputs(name: str) -> dict:
    """The arguments of a forward pass at σ = 0.5 and batch 2, without the time."""
    text = {"encoder_hidden_states": randn(2, 7, 32), "return_dict": False}
    if name == "wan":
        return text | {"hidden_states": randn(2, 16, 1, 4, 4), "timestep": torch.tensor([500, 500])}
    if name == "sd3":
        return text | {
            "hidden_states": randn(2, 4, 8, 8), "pooled_projections": randn(2, 64), "timestep": torch.tensor([500.0, 500.0])
        }  # fmt: skip
    positions = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    sample = {"hidden_states": randn(2, 16, 4), "pooled_projections": randn(2, 32)}
    return text | sample | positions | {"timestep": torch.tensor([0.5, 0.5])}


@torch.no_grad()
def call(accelerator, model: nn.Module, arguments: dict) -> torch.Tensor:
    with accelerator:
        return accelerator.put(model)(**accelerator.put(arguments))[0].cpu()


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_computes_the_same_there_and_never_waits(accelerator, name):
    model = DENOISERS[name]()
    with torch.no_grad():
        expected = model(**inputs(name))[0]
    torch.testing.assert_close(call(accelerator, model, inputs(name)), expected)
    assert accelerator.waits == [COPY]  # of the output


def test_tensors_elsewhere_are_refused_as_on_a_real_one(accelerator):
    there = accelerator.put(torch.zeros(2))
    with accelerator, pytest.raises(RuntimeError, match="on one device"):
        there + torch.zeros(2)


def test_it_sees_what_a_cpu_waits_for(accelerator):
    there = accelerator.put(torch.tensor([3.0, 0.0]))
    with accelerator:
        there.sum() * 2 + torch.ones(2, device=there.device)
        assert accelerator.waits == []
        for wait in (
            lambda: there[0].item(),
            lambda: bool(there.any()),
            lambda: there.nonzero(),
            lambda: there[there > 0],
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: torch.ones(2).to(there.device),
            lambda: torch.tensor([1, 2], device=there.device),
        ):
            accelerator.waits.clear()
            wait()
            assert len(accelerator.waits) == 1


@pytest.mark.parametrize("name", DENOISERS)
def test_experts_wait_once_in_a_step_to_know_the_time(accelerator, name):
    experts = DenoiserExperts([DENOISERS[name](seed=seed) for seed in (0, 1)], INTERVALS)
    call(accelerator, experts, inputs(name))
    assert accelerator.waits == [COPY] * 2  # of the time and the output


@pytest.mark.parametrize("name", DENOISERS)
def test_lora_experts_wait_once_in_a_step_to_know_the_time(accelerator, name):
    model = DENOISERS[name]()
    for adapter in ("low", "high"):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter)
    LoraExperts(["low", "high"], INTERVALS).attach(model)
    call(accelerator, model, inputs(name))
    assert accelerator.waits == [COPY] * 2  # of the time and the output


MIXED = {"sd3": [950.0, 100.0], "flux": [0.95, 0.1], "wan": [950, 100]}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_batch_of_several_experts_waits_once_too(accelerator, name):
    experts = DenoiserExperts([DENOISERS[name](seed=seed) for seed in (0, 1)], INTERVALS)
    arguments = inputs(name) | {"timestep": torch.tensor(MIXED[name])}
    with torch.no_grad():
        expected = experts(**arguments)[0]
    torch.testing.assert_close(call(accelerator, experts, arguments), expected)
    assert accelerator.waits == [COPY] * 2  # of the time and the output


@pytest.mark.parametrize("name", DENOISERS)
def test_task_routing_waits_at_the_first_step_only(accelerator, name):
    model = DENOISERS[name]()
    TaskRouting(sharing_ratio=0.5).attach(model)
    call(accelerator, model, inputs(name))
    accelerator.waits.clear()
    call(accelerator, model, inputs(name))
    assert accelerator.waits == [COPY]  # of the output


@torch.no_grad()
def test_a_schedule_there_is_waited_for_at_the_first_step_only(accelerator):
    finder = ExpertFinder(flux(), INTERVALS)
    schedule = accelerator.put(torch.tensor([1000.0, 875.0, 500.0]))
    with accelerator:
        told = [timestep.bfloat16() / 1000 for timestep in schedule]
        assert [finder((), {"timestep": each}, schedule) for each in told] == [[1], [1], [0]]
    assert accelerator.waits == [COPY] * 4
    with accelerator:
        schedule.copy_(schedule.flip(0))  # as a new schedule would be
        assert finder((), {"timestep": schedule[0] / 1000}, schedule) == [0]
    assert accelerator.waits == [COPY] * 6


def waits_of_a_sampling(accelerator, name: str, denoiser: nn.Module, attach=lambda pipe: None) -> int:
    """How often the CPU waits for the accelerator in the three steps of a real pipeline that is there as a whole."""
    recipe = RECIPES[name]
    pipe = recipe.pipe(denoiser)
    attach(pipe)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            accelerator.put(component)
    accelerator.waits.clear()
    with accelerator:
        generate(name, pipe, 3, **accelerator.put(recipe.call()))
    return len(accelerator.waits)


# By how many waits more a sampling has with experts than without. These compute the time anew for every call, which waits:
# six calls, three of Z-Image's. The second expert also makes the tables of Qwen-Image's and Z-Image's positions, as the first.
WAITS = {"flux": 6, "qwen": 6 + 2, "zimage": 3 + 3}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_sampling_with_experts_waits_once(accelerator, name):
    plain = waits_of_a_sampling(accelerator, name, RECIPES[name].denoiser())
    experts = DenoiserExperts([RECIPES[name].denoiser(seed=seed) for seed in (0, 1)], HALVES)
    assert waits_of_a_sampling(accelerator, name, experts) - plain == WAITS.get(name, 1)


def test_a_sampling_with_lora_experts_waits_once(accelerator):
    def attach(pipe) -> None:
        for adapter in ("low", "high"):
            pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter)
        LoraExperts(["low", "high"], HALVES).attach(pipe)  # and of the schedule

    plain = waits_of_a_sampling(accelerator, "sd3", sd3())
    assert waits_of_a_sampling(accelerator, "sd3", sd3(), attach) - plain == 1


def test_memory_is_counted_until_it_is_freed(accelerator):
    there = accelerator.put(torch.zeros(100))
    assert accelerator.num_bytes == 400
    with accelerator:
        part = (there + 1)[50:]
        assert accelerator.num_bytes == 800  # the part holds the whole sum
        del part, there
    assert (accelerator.num_bytes, accelerator.peak_bytes) == (0, 800)


def peak_bytes(pretended, model: nn.Module) -> int:
    """The peak memory of four steps, the time falling, with a model that is offloaded as `enable_model_cpu_offload` does."""
    accelerator = pretended.PretendedAccelerator()
    _, hook = cpu_offload_with_hook(model, pretended.DEVICE)
    with torch.no_grad(), accelerator:
        for timestep in (950.0, 900.0, 500.0, 100.0):
            model(**accelerator.put(inputs("sd3") | {"timestep": torch.tensor([timestep, timestep])}))
        hook.offload()
    hook.remove()
    return accelerator.peak_bytes


def test_offloaded_experts_take_the_memory_of_the_larger_one(pretended):
    larger, smaller = sd3(num_layers=4), sd3(num_layers=2)
    alone = peak_bytes(pretended, copy.deepcopy(larger))
    assert peak_bytes(pretended, DenoiserExperts([smaller, copy.deepcopy(larger)], INTERVALS)) == pytest.approx(
        alone, rel=0.01
    )
    both = sum(tensor.nbytes for model in (larger, smaller) for tensor in (*model.parameters(), *model.buffers()))
    assert alone < both
