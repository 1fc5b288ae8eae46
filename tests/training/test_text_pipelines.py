"""Each family's adapter calls the denoiser as the real pipeline does, with prompts that real text encoders have encoded."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
)
from tiny_pipelines import RECIPES, filled, flux, image_vae, pixart, randn, seeded, wan, wan_pipe
from tiny_text import text_components, with_text
from torch.nn.utils.rnn import pad_sequence

from diffusers_dmp import DenoiserExperts, NoiseIntervals
from diffusers_dmp.diffusion.latents import unpack_latents
from diffusers_dmp.models.time_argument import time_argument_of
from diffusers_dmp.training.text_pipelines import registry, text_pipeline_of
from diffusers_dmp.training.text_pipelines.flux import FluxText

PROMPTS = ("a handwritten seven", "a cat")  # not of one length
WITHOUT_GUIDANCE = {"guidance_scale": 1.0}
GUIDANCE_ELSEWHERE = {"flux": {"guidance_scale": 3.5}, "qwen": {}, "zimage": {"guidance_scale": 0.0}}
SDXL_SIZES = {"original_size": (12, 10), "crops_coords_top_left": (1, 2), "target_size": (8, 16)}
PACKED = ("flux", "qwen")


def in_one_batch(columns):
    """The columns of a batch: prompts of different lengths are padded with zeros."""
    return {
        name: pad_sequence(column, batch_first=True) if isinstance(column, list) else column
        for name, column in columns.items()
    }


def conditions_of(text_pipeline, pipe, prompts=PROMPTS, sizes=((8, 16), (0, 0), (8, 16))):
    original, crop, target = (torch.tensor([size] * len(prompts)) for size in sizes)
    columns = in_one_batch(text_pipeline.encode_prompts(pipe, prompts))
    return columns | text_pipeline.size_columns(original, crop, target)


def watch(pipe, *denoisers):
    """Record what a pipeline gives its denoisers and its scheduler in each step: arguments, predictions and timesteps."""
    seen = SimpleNamespace(calls=[], predictions=[], timesteps=[])
    step = pipe.scheduler.step

    def recorded_step(model_output, timestep, *args, **kwargs):
        seen.predictions.append(model_output.clone())
        seen.timesteps.append(torch.as_tensor(timestep).float())
        return step(model_output, timestep, *args, **kwargs)

    def record_call(module, args, kwargs):
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        seen.calls.append((module, dict(zip(names, args)) | kwargs))

    pipe.scheduler.step = recorded_step
    hooks = [denoiser.register_forward_pre_hook(record_call, with_kwargs=True) for denoiser in denoisers]
    return seen, hooks


def noisy_latents(name, arguments, latent_size):
    """What a denoiser was called with, as latents (B, C, [F,] h, w)."""
    x_t = next(arguments[key] for key in ("hidden_states", "sample", "x") if key in arguments)
    if isinstance(x_t, list):
        return torch.stack(x_t)[:, :, 0]
    return unpack_latents(x_t, *latent_size) if name in PACKED else x_t


def steps_of(name, pipe, *denoisers, **call):
    """Run a pipeline for two steps with prompts. Returns for each: denoiser, x_t, what it is told, and the prediction."""
    seen, hooks = watch(pipe, *denoisers)
    sizes = {"height": 32, "width": 64} if name in ("qwen", "zimage", "wan") else {"height": 8, "width": 16}
    unguided = GUIDANCE_ELSEWHERE.get(name, WITHOUT_GUIDANCE)
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": seeded(), **sizes, **unguided, **call}
    pipe.set_progress_bar_config(disable=True)
    pipe(list(PROMPTS), **arguments)  # Z-Image changes the list
    for hook in hooks:
        hook.remove()
    latent_size = (8, 16)
    for (denoiser, passed), prediction, timestep in zip(seen.calls, seen.predictions, seen.timesteps, strict=True):
        x_t = noisy_latents(name, passed, latent_size)
        time = time_argument_of(denoiser).told(timestep.expand(len(x_t)), 1000)
        yield denoiser, x_t, time, unpack_latents(prediction, *latent_size) if name in PACKED else prediction


EXTRA_ARGUMENTS = {
    "sdxl": SDXL_SIZES,
    "pixart": {"use_resolution_binning": False},
    "wan": {"num_frames": 5},
}


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_calls_the_denoiser_as_the_pipeline_does(name):
    denoiser = RECIPES[name].denoiser()
    pipe = with_text(name, RECIPES[name].pipe(denoiser))
    text_pipeline = text_pipeline_of(pipe)
    conditions = conditions_of(text_pipeline, pipe, sizes=tuple(SDXL_SIZES.values()))
    for _, x_t, time, prediction in steps_of(name, pipe, denoiser, **EXTRA_ARGUMENTS.get(name, {})):
        called = text_pipeline.call(denoiser, denoiser.config, x_t, time, conditions)
        assert called.shape == x_t.shape and prediction.abs().max() > 0.05
        assert torch.equal(called, prediction)


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_a_samples_prediction_does_not_depend_on_its_neighbours(name):
    """Neither on how long their prompts are, nor on their times, also where the samples are of different experts."""
    denoisers = [RECIPES[name].denoiser(seed) for seed in (0, 1)]
    experts = DenoiserExperts(experts=denoisers, intervals=NoiseIntervals.from_timesteps([500]))
    pipe = with_text(name, RECIPES[name].pipe(denoisers[0]))
    text_pipeline = text_pipeline_of(pipe)
    shape = (4, 8, 16) if name in ("sd3", "pixart", "sdxl", "sd15", "qwen") else (16, 8, 16)
    shape = {"wan": (16, 2, 8, 16), "flux": (1, 8, 16)}.get(name, shape)
    x_t, config = randn(2, *shape), denoisers[0].config
    time = time_argument_of(denoisers[0]).told(torch.tensor([900.0, 100.0]), 1000)
    together = text_pipeline.call(experts, config, x_t, time, conditions_of(text_pipeline, pipe))
    for index, expert in enumerate((1, 0)):
        alone = conditions_of(text_pipeline, pipe, PROMPTS[index : index + 1])
        one = slice(index, index + 1)
        expected = text_pipeline.call(denoisers[expert], config, x_t[one], time[one], alone)
        torch.testing.assert_close(together[one], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_flux_with_distilled_guidance():
    transformer = flux(guidance_embeds=True)
    pipe = with_text("flux", RECIPES["flux"].pipe(transformer))
    conditions = conditions_of(FluxText(), pipe)
    for _, x_t, time, prediction in steps_of("flux", pipe, transformer, guidance_scale=3.5):
        called = FluxText(guidance_scale=3.5).call(transformer, transformer.config, x_t, time, conditions)
        assert torch.equal(called, prediction)
        default = text_pipeline_of(pipe).call(transformer, transformer.config, x_t, time, conditions)
        assert not torch.allclose(default, prediction, atol=1e-3)
    for _, x_t, time, prediction in steps_of("flux", pipe, transformer, guidance_scale=1.0):
        called = text_pipeline_of(pipe).call(transformer, transformer.config, x_t, time, conditions)
        assert torch.equal(called, prediction)


@torch.no_grad()
def test_pixart_alpha_is_told_the_size():
    transformer = pixart(sample_size=128)
    scheduler, vae = DDIMScheduler(), image_vae(4, None)
    pipe = PixArtAlphaPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **text_components("pixart"))
    text_pipeline = text_pipeline_of(pipe)
    conditions = conditions_of(text_pipeline, pipe)
    for _, x_t, time, prediction in steps_of("pixart", pipe, transformer, use_resolution_binning=False):
        assert torch.equal(text_pipeline.call(transformer, transformer.config, x_t, time, conditions), prediction)
    resized = conditions | text_pipeline.size_columns(*torch.tensor([[[64, 64]] * 2, [[0, 0]] * 2, [[8, 16]] * 2]))
    called = text_pipeline.call(transformer, transformer.config, x_t, time, resized)
    assert not torch.allclose(called, prediction, atol=1e-3)


@torch.no_grad()
def test_the_example_in_the_docs_teaches_a_family(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    example = (REPOSITORY / "docs" / "text_pipelines.md").read_text().split("```python\n")[-1].split("```")[0]
    exec(example, {})
    sizes = {"sample_size": 16, "pos_embed_max_size": 64, "attention_head_dim": 8, "num_attention_heads": 4}
    depth = {
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
    }
    transformer = filled(AuraFlowTransformer2DModel(**sizes, **depth), 0)
    scheduler, vae = FlowMatchEulerDiscreteScheduler(), image_vae(4)
    pipe = AuraFlowPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **text_components("wan"))
    text_pipeline = text_pipeline_of(pipe)
    conditions = conditions_of(text_pipeline, pipe)
    for _, x_t, time, prediction in steps_of("auraflow", pipe, transformer):
        assert torch.equal(text_pipeline.call(transformer, transformer.config, x_t, time, conditions), prediction)
    mean, _ = text_pipeline.encode_images(pipe, randn(1, 3, 8, 16))
    torch.testing.assert_close(mean, (vae.encode(randn(1, 3, 8, 16)).latent_dist.mean - 0.0609) * 1.5035)


@pytest.mark.parametrize("config", [{"boundary_ratio": 0.9}, {"expand_timesteps": True}])
@torch.no_grad()
def test_wan_2_2(config):
    transformers = [wan(0), wan(1)] if "boundary_ratio" in config else [wan(0)]
    second = dict(zip(["transformer_2"], transformers[1:]))
    pipe = with_text("wan", wan_pipe(transformers[0], **second, **config))
    text_pipeline = text_pipeline_of(pipe)
    assert all(hasattr(pipe, component) for component in text_pipeline.components)
    conditions = conditions_of(text_pipeline, pipe)
    steps = list(steps_of("wan", pipe, *transformers, num_frames=1))
    assert {transformers.index(step[0]) for step in steps} == set(range(len(transformers)))
    for transformer, x_t, time, prediction in steps:
        assert x_t.shape[2] == 1  # a single image
        called = text_pipeline.call(transformer, transformer.config, x_t, time, conditions)
        torch.testing.assert_close(called, prediction, atol=1e-5, rtol=1e-5)  # one time instead of one for each token
