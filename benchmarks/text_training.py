"""Training steps with one LoRA per noise interval, compared with the same steps with one LoRA for all noise."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.functional import set_requires_grad

from diffusers_dmp import LoraExperts, NoiseIntervals

from .experts import ATTENTION, MLP, sd3_inputs, sd3_of, twin_of
from .timing import Ratio, Settings

MIXED_TARGET, ONE_TARGET = 1.05, 1.01
NUM_EXPERTS = (2, 4)
RANK = 16
DEPTH = 0.25  # of the preset's blocks, so that a step with 16 samples takes seconds; what is added to a call then weighs more


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare the steps for each dtype, batch size and number of experts."""
    for dtype in settings.dtypes:
        for batch_size in settings.batch_sizes:
            yield from compare_steps(settings, dtype, batch_size)


def compare_steps(settings: Settings, dtype: torch.dtype, batch_size: int) -> Iterator[Ratio]:
    """Compare steps that train all experts, on as many samples each, and steps that train one of them in turn."""
    device = settings.device
    with device:
        bare = sd3_of(settings.preset, DEPTH).to(device).to(dtype).train()
    case = f"SD3 of {settings.preset}'s width, {settings.name_of(dtype)} batch {batch_size}"
    plain = with_loras(bare, 1)
    for num_experts in NUM_EXPERTS:
        intervals = NoiseIntervals.uniform(num_experts)
        model = with_loras(bare, num_experts)
        LoraExperts(names_of(num_experts), intervals).attach(model)
        middles = [(low + high) / 2 for low, high in zip(intervals.edges, intervals.edges[1:])]
        step_of = partial(training_step, inputs=sd3_inputs(batch_size, device, dtype), compile=settings.compile)

        whole = [torch.full((batch_size,), middle, device=device) for middle in middles]
        baseline = step_of(plain, timesteps=itertools.repeat(whole[0]))
        in_turn = step_of(model, timesteps=itertools.cycle(whole))
        for _ in whole:
            in_turn()  # AdamW makes the moments of an expert in its first step
        yield settings.compare(f"{case}: one of {num_experts} experts / one LoRA", in_turn, baseline, ONE_TARGET)
        if batch_size % num_experts == 0:
            mixed = itertools.repeat(torch.tensor(middles, device=device).repeat(batch_size // num_experts))
            yield settings.compare(
                f"{case}: {num_experts} experts, mixed / one LoRA",
                step_of(model, timesteps=mixed),
                baseline,
                MIXED_TARGET,
            )
            # what smaller batches cost by themselves
            parts = step_of(plain, timesteps=mixed, num_parts=num_experts)
            yield settings.compare(f"{case}: one LoRA, the batch in {num_experts} parts / one LoRA", parts, baseline)


def names_of(num_adapters: int) -> list[str]:
    """The names of the adapters."""
    return [f"expert_{index}" for index in range(num_adapters)]


def with_loras(bare: Any, num_adapters: int) -> Any:
    """Make a model of the same frozen weights with LoRAs that are all trained."""
    model = twin_of(bare)
    for name in names_of(num_adapters):
        model.add_adapter(LoraConfig(r=RANK, target_modules=ATTENTION + MLP), adapter_name=name)
    set_requires_grad(model, names_of(num_adapters))
    return model


def training_step(
    model: Any,
    inputs: dict[str, torch.Tensor],
    timesteps: Iterator[torch.Tensor],
    compile: bool,
    num_parts: int = 1,
) -> Callable[[], object]:
    """Make a function of one step of AdamW on all adapters of a model, at the next of some timesteps (B,)."""
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], fused=True
    )  # as the trainings
    target = torch.randn_like(inputs["hidden_states"])
    if compile:
        model.compile(dynamic=False)

    def step():
        arguments = inputs | {"timestep": next(timesteps)}
        parts = [
            {name: value.chunk(num_parts)[part] for name, value in arguments.items()} for part in range(num_parts)
        ]
        prediction = torch.cat([model(**part, return_dict=False)[0] for part in parts])
        F.mse_loss(prediction, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
