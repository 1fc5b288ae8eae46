"""Tiny denoisers of Diffusers' pipelines with LoRA, and the switch between them as one would write it by hand."""

import copy
import functools
from collections import Counter
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import RECIPES, generate, seeded

from diffusers_dmp.models.time_argument import TimeArgument, time_argument_of

LORAS = {"low": (2, 3.0), "high": (3, 2.0), "style": (1, 1.0)}  # rank and alpha
TARGETS = ["to_q", "to_v"]


def add_loras(denoiser: Any, names: list[str], **config: Any) -> Any:
    """Add adapters with random weights that differ clearly; all of them require gradients."""
    for name in names:
        rank, alpha = LORAS[name]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, **config), denoiser, name)
    for name, parameter in denoiser.named_parameters():
        is_adapter = any(f".{lora}." in name for lora in LORAS)
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            seed = sum(map(ord, name))
            parameter.data = torch.randn(parameter.shape, generator=seeded(seed)) * 0.3
    return denoiser


def activate(denoiser: Any, adapters: list[tuple[str, float]]) -> Any:
    """Activate adapters by PEFT's own methods, but leave it as it is which of them require gradients."""
    required = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name for name, _ in adapters])
            for name, weight in adapters:
                layer.set_scale(name, weight)
    for parameter, requires_grad in required.items():
        parameter.requires_grad_(requires_grad)
    return denoiser


def with_only(name: str, adapters: list[tuple[str, float]], **config: Any) -> Any:
    """A denoiser of `RECIPES` that has these adapters alone, all active."""
    denoiser = add_loras(RECIPES[name].denoiser(), [adapter for adapter, _ in adapters], **config)
    return activate(denoiser, adapters)


def timestep_of(name: str, args: tuple, kwargs: dict) -> float:
    """What a call of a pipeline's denoiser means in training timesteps, as one reads it in the pipeline's code."""
    if name == "zimage":
        return 1000 * (1 - float(args[1][0]))
    value = kwargs["timestep"] if "timestep" in kwargs else args[1]
    t = float(torch.as_tensor(value).flatten()[0])
    return 1000 * t if name in ("flux", "qwen") else t


def switch_by_hand(name: str, denoisers: list[Any], boundaries: list[float]) -> tuple[Any, Counter]:
    """Let the first denoiser call the one that owns the noise, and count the calls of each."""
    forwards = [denoiser.forward for denoiser in denoisers]
    calls: Counter = Counter()

    def forward(*args, **kwargs):
        owner = sum(timestep_of(name, args, kwargs) >= boundary - 1e-3 for boundary in boundaries)
        calls[owner] += 1
        return forwards[owner](*args, **kwargs)

    denoiser = denoisers[0]
    denoiser.forward = forward
    return denoiser, calls


def adapters_in_use(denoiser: Any) -> list[tuple[list[str], dict[str, float]]]:
    return [
        (copy.copy(layer.active_adapters), dict(layer.scaling))
        for layer in denoiser.modules()
        if isinstance(layer, BaseTunerLayer)
    ]


@functools.cache
def _call_of(name: str, batch_size: int) -> tuple[tuple, dict[str, Any], TimeArgument]:
    """The arguments of one of a pipeline's calls of its denoiser, without guidance."""
    recipe = RECIPES[name]
    denoiser, calls = recipe.denoiser(), []
    denoiser.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    call = {
        key: value for key, value in {"guidance_scale": 0.0, "true_cfg_scale": 1.0}.items() if key in recipe.call()
    }
    call["num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"] = batch_size
    generate(name, recipe.pipe(denoiser), 1, **call)
    return *calls[0], time_argument_of(denoiser)


def inputs_of(name: str, timesteps: list[float]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a pipeline's call of its denoiser, but with a timestep for each sample."""
    args, kwargs, argument = _call_of(name, len(timesteps))
    time = argument.told(torch.tensor(timesteps), 1000)
    if argument.name in kwargs:
        return args, kwargs | {argument.name: time}
    return (args[0], time, *args[2:]), kwargs


def output_of(denoiser: Any, inputs: tuple[tuple, dict[str, Any]]) -> torch.Tensor:
    args, kwargs = inputs
    output = denoiser(*args, **kwargs | {"return_dict": False})[0]
    return torch.stack(output) if isinstance(output, list) else output


def gradients(denoiser: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
