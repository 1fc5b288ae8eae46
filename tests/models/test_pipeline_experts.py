"""Pipelines with two transformers, as Wan2.2's, and with one model of both: the same samples, and back again."""

import math
from functools import partial

import pytest
import torch
from diffusers import (
    LucyEditPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import filled, generate, sd3, sd3_pipe, wan, wan_pipe

from diffusers_dmp import DenoiserExperts, NoiseIntervals
from diffusers_dmp.models.pipeline_experts import _ratio

RATIO = 0.875


def wan22(**config) -> WanPipeline:
    return wan_pipe(wan(0), transformer_2=wan(1, num_layers=1), boundary_ratio=RATIO, **config)


def as_one(pipe: WanPipeline) -> WanPipeline:
    experts = DenoiserExperts.from_pipeline(pipe)
    pipe.register_modules(transformer=experts, transformer_2=None)
    pipe.register_to_config(boundary_ratio=None)
    return pipe


@pytest.mark.parametrize("per_token", [False, True])
def test_one_model_samples_as_two_transformers_and_back(per_token):
    pipe = wan22(expand_timesteps=per_token)
    low, high = pipe.transformer_2, pipe.transformer
    expected = generate("wan", pipe)
    experts = as_one(pipe).transformer
    assert [*experts.experts] == [low, high]
    assert experts.intervals == NoiseIntervals((0, 875, 1000))
    assert torch.equal(generate("wan", pipe), expected)
    assert not torch.equal(generate("wan", wan_pipe(high)), expected)  # the low-noise transformer is at work, too

    assert experts.to_pipeline(pipe) is pipe
    assert (pipe.transformer, pipe.transformer_2, pipe.config.boundary_ratio) == (high, low, RATIO)
    assert torch.equal(generate("wan", pipe), expected)


def test_saved_as_one_and_loaded(tmp_path):
    pipe = as_one(wan22())
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "transformer_2").exists()
    loaded = WanPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert type(loaded.transformer) is DenoiserExperts and loaded.config.boundary_ratio is None
    assert torch.equal(generate("wan", loaded), generate("wan", pipe))


def test_guidance_for_each_expert_belongs_to_the_pipeline():
    """With one transformer it is refused, not ignored; with the experts in both places it is as it was."""
    pipe = wan22()
    expected = generate("wan", pipe, guidance_scale_2=2.0)
    assert not torch.equal(generate("wan", pipe), expected)
    experts = as_one(pipe).transformer
    with pytest.raises(ValueError, match="guidance_scale_2"):
        generate("wan", pipe, guidance_scale_2=2.0)
    pipe.transformer_2 = experts
    pipe.register_to_config(boundary_ratio=RATIO)
    assert torch.equal(generate("wan", pipe, guidance_scale_2=2.0), expected)


def frames(num_frames: int) -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), (10 * index, 80, 160)) for index in range(num_frames)]


def vace(seed: int = 0) -> WanVACETransformer3DModel:
    config = dict(wan(0).config) | {"num_layers": 2, "vace_layers": [0, 1], "vace_in_channels": 96}
    return filled(WanVACETransformer3DModel.from_config(config), seed)


# the other pipelines with two transformers: how they are made of a denoiser's maker, and what they are called with besides
OTHERS = {
    "image to video": (WanImageToVideoPipeline, partial(wan, in_channels=36), {}, {"image": frames(1)[0]}),
    # the tokens of the first frame have t = 0, the others t: it is they that decide
    "image to video, per token": (WanImageToVideoPipeline, wan, {"expand_timesteps": True}, {"image": frames(1)[0]}),
    "VACE": (WanVACEPipeline, vace, {}, {"video": frames(9)}),
    "Lucy": (LucyEditPipeline, partial(wan, in_channels=32), {}, {"video": frames(9)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_pipeline_with_two_transformers(name):
    pipeline_class, make, config, call = OTHERS[name]
    parts = wan_pipe(None).components | {"transformer": make(0), "transformer_2": make(1), "boundary_ratio": RATIO}
    pipe = pipeline_class(**parts, **config)
    expected = generate("wan", pipe, num_inference_steps=4, **call)
    assert torch.equal(generate("wan", as_one(pipe), num_inference_steps=4, **call), expected)
    assert torch.equal(generate("wan", pipe.transformer.to_pipeline(pipe), num_inference_steps=4, **call), expected)


@given(st.floats(1e-3, 999.9) | st.integers(1, 999))
@example(504.7)  # 504.7 / 1000 * 1000 is larger
def test_the_boundary_ratio_gives_an_edge_to_the_same_transformer(edge):
    """The pipelines ask whether t >= boundary_ratio * num_train_timesteps."""
    assert edge >= _ratio(edge, 1000) * 1000 > math.nextafter(edge, 0.0) - 1e-9


def test_refuses_pipelines_without_two_transformers():
    with pytest.raises(ValueError, match="`transformer_2` and a `boundary_ratio`.*got a StableDiffusion3Pipeline"):
        DenoiserExperts.from_pipeline(sd3_pipe(sd3()))
    with pytest.raises(ValueError, match="WanPipeline without `transformer_2`, `boundary_ratio`"):
        DenoiserExperts.from_pipeline(wan_pipe(wan()))


def test_refuses_to_put_back_what_does_not_fit():
    pipe = as_one(wan22())
    three = DenoiserExperts([wan(0), wan(1), wan(2)], NoiseIntervals.from_sigmas([0.3, 0.875]))
    with pytest.raises(ValueError, match="Expected 2 experts for a WanPipeline.* but got 3"):
        three.to_pipeline(pipe)
    with pytest.raises(ValueError, match="got a StableDiffusion3Pipeline"):
        pipe.transformer.to_pipeline(sd3_pipe(sd3()))
    of_another_length = DenoiserExperts([wan(0), wan(1)], NoiseIntervals.from_sigmas([0.875], 100))
    with pytest.raises(ValueError, match="num_train_timesteps"):
        of_another_length.to_pipeline(pipe)
    assert type(pipe.transformer) is DenoiserExperts and pipe.transformer_2 is None  # nothing was changed


def test_refuses_pipelines_whose_components_are_being_offloaded():
    pipe = wan22()
    pipe._all_hooks = ["a hook"]  # what `enable_model_cpu_offload` leaves, which needs an accelerator
    with pytest.raises(ValueError, match="enable_model_cpu_offload.*remove_all_hooks"):
        DenoiserExperts.from_pipeline(pipe)
