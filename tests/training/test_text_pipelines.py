"""Each family's adapter calls the denoiser as the real pipeline does."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import RECIPES, generate

from diffusers_dmp.diffusion.latents import unpack_latents
from diffusers_dmp.models.time_argument import time_argument_of
from diffusers_dmp.training.text_pipelines import text_pipeline_of

WITHOUT_GUIDANCE = {"guidance_scale": 1.0}
UNGUIDED = {
    "flux": {"guidance_scale": 3.5, "true_cfg_scale": 1.0},
    "qwen": {"true_cfg_scale": 1.0},
    "zimage": {"guidance_scale": 0.0},
}


class Seen(SimpleNamespace):
    """What a pipeline gave its denoiser and its scheduler in each step: arguments, predictions and timesteps."""


def watch(pipe, denoiser):
    """Record what a pipeline gives its denoiser and its scheduler."""
    seen = Seen(calls=[], predictions=[], timesteps=[])
    step = pipe.scheduler.step

    def recorded_step(model_output, timestep, *args, **kwargs):
        seen.predictions.append(model_output.clone())
        seen.timesteps.append(torch.as_tensor(timestep))
        return step(model_output, timestep, *args, **kwargs)

    pipe.scheduler.step = recorded_step
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.calls.append(dict(zip(names, args)) | kwargs), with_kwargs=True
    )
    return seen


def conditions_of(name, arguments):
    """The columns of precomputed embeddings, those that a pipeline was called with."""
    columns = {key: value for key, value in RECIPES[name].call().items() if key.startswith(("prompt", "pooled"))}
    if name == "zimage":
        columns = {"prompt_embeds": torch.stack(columns["prompt_embeds"]), "prompt_embeds_mask": torch.ones(1, 7)}
    if name == "sdxl":
        columns["time_ids"] = arguments["added_cond_kwargs"]["time_ids"]
    return columns


def unpacked(name, tensor):
    """What a family's denoiser takes or returns, as latents (B, C, [F,] h, w)."""
    if isinstance(tensor, list):
        return torch.stack(tensor)[:, :, 0]
    if name in ("flux", "qwen"):
        size = 2 * int(tensor.shape[1] ** 0.5)
        return unpack_latents(tensor, size, size)
    return tensor


@pytest.mark.parametrize("name", RECIPES)
def test_calls_the_denoiser_as_the_pipeline_does(name):
    denoiser = RECIPES[name].denoiser()
    pipe = RECIPES[name].pipe(denoiser)
    text_pipeline = text_pipeline_of(pipe)
    seen = watch(pipe, denoiser)
    generate(name, pipe, 2, **UNGUIDED.get(name, WITHOUT_GUIDANCE))
    for arguments, prediction, timestep in zip(list(seen.calls), seen.predictions, seen.timesteps, strict=True):
        x_t = next(arguments[key] for key in ("hidden_states", "sample", "x") if key in arguments)
        x_t = unpacked(name, x_t)
        time = time_argument_of(denoiser).told(timestep.float().expand(len(x_t)), 1000)
        with torch.no_grad():
            called = text_pipeline.call(denoiser, denoiser.config, x_t, time, conditions_of(name, arguments))
        assert torch.equal(called, unpacked(name, prediction))
