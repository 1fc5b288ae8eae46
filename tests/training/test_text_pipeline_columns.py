"""What families of pipelines encode: prompts, images and sizes; and how other families are taught."""

import pytest
import torch
from diffusers import DDPMPipeline, FluxPipeline, StableDiffusion3Pipeline
from tiny_pipelines import RECIPES, randn, seeded
from tiny_text import text_components, with_text

from diffusers_dmp.diffusion.latents import pack_latents
from diffusers_dmp.training.text_pipelines import TextPipeline, register_conditions, registry, text_pipeline_of
from diffusers_dmp.training.text_pipelines.flux import FluxText

PROMPTS = ("a handwritten seven", "")
RAGGED = ("qwen", "zimage")


def make(name):
    pipe = with_text(name, RECIPES[name].pipe(RECIPES[name].denoiser()))
    pipe.set_progress_bar_config(disable=True)
    return pipe, text_pipeline_of(pipe)


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_are_encoded_as_if_each_were_alone(name):
    pipe, text_pipeline = make(name)
    columns = text_pipeline.encode_prompts(pipe, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = text_pipeline.encode_prompts(pipe, [prompt])
        assert alone.keys() == columns.keys()
        for key in columns:
            torch.testing.assert_close(columns[key][index], alone[key][0], atol=1e-5, rtol=1e-4)
            assert not columns[key][index].requires_grad
    lengths = {len(each) for each in columns["prompt_embeds"]}
    assert len(lengths) == (2 if name in RAGGED else 1)
    if name in RAGGED:
        masks = columns["prompt_embeds_mask"]
        assert all(mask.all() and len(mask) == len(each) for mask, each in zip(masks, columns["prompt_embeds"]))


@pytest.mark.parametrize("name", ["sd3", "wan", "pixart", "zimage", "sdxl", "sd15"])
def test_the_empty_prompt_is_what_guidance_guides_away_from(name):
    pipe, text_pipeline = make(name)
    arguments = {"prompt_2": None, "prompt_3": None} if name == "sd3" else {}
    if name == "sd15":
        arguments = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    if name == "wan":
        arguments = {"max_sequence_length": 512}
    with torch.no_grad():
        encoded = pipe.encode_prompt(["a cat"], do_classifier_free_guidance=True, **arguments)
    negatives = encoded[2:] if name == "pixart" else encoded[1::2]
    columns = text_pipeline.encode_prompts(pipe, [""])
    for column, negative in zip(columns.values(), negatives):
        torch.testing.assert_close(column[0], negative[0])


def test_sdxl_without_zeros_for_the_empty_prompt():
    pipe, text_pipeline = make("sdxl")
    empty, cat = text_pipeline.encode_prompts(pipe, ["", "a cat"])["pooled_prompt_embeds"]
    assert empty.abs().max() == 0 and cat.abs().max() > 0
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    embeds = text_pipeline.encode_prompts(pipe, [""])["prompt_embeds"]
    assert torch.equal(embeds, pipe.encode_prompt("", do_classifier_free_guidance=False)[0])


def test_sd3_without_t5():
    pipe, text_pipeline = make("sd3")
    with_t5 = text_pipeline.encode_prompts(pipe, PROMPTS)["prompt_embeds"]
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    without = text_pipeline.encode_prompts(pipe, PROMPTS)["prompt_embeds"]
    assert with_t5.shape == without.shape and without[:, 77:].abs().max() == 0
    assert torch.equal(with_t5[:, :77], without[:, :77])


def test_a_prompt_that_is_too_long_is_cut():
    pipe, text_pipeline = make("sd15")
    long, longer = (text_pipeline.encode_prompts(pipe, ["x " * count])["prompt_embeds"] for count in (100, 200))
    assert torch.equal(long, longer)


@pytest.mark.parametrize("name", RECIPES)
def test_refuses_to_encode_prompts_without_a_text_encoder(name):
    pipe, text_pipeline = make(name)
    pipe.register_modules(text_encoder=None)
    with pytest.raises(
        ValueError, match=rf"{type(pipe).__name__} that encodes prompts.* without `text_encoder`; load"
    ):
        text_pipeline.encode_prompts(pipe, PROMPTS)


def decoded_by_the_pipeline(pipe, name, latents):
    """Images that a pipeline makes of latents, as if it had just generated them, by its own formula."""
    latents = pack_latents(latents) if name in ("flux", "qwen") else latents
    if name == "pixart":
        callback = {"callback": lambda step, timestep, own: own.copy_(latents), "use_resolution_binning": False}
    else:
        callback = {"callback_on_step_end": lambda pipe, step, timestep, tensors: {"latents": latents}}
    frames = {"num_frames": 5} if name == "wan" else {}
    sizes = {"height": 16, "width": 32, "num_inference_steps": 1, "generator": seeded()}
    return pipe("a cat", output_type="pt", return_dict=False, **sizes, **frames, **callback)[0]


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_the_pipeline_decodes_what_is_encoded(name):
    pipe, text_pipeline = make(name)
    if name == "qwen":
        pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[0.5, 2.0, 1.0, 4.0])
    images = (randn(1, 3, 5, 16, 32) if name == "wan" else randn(1, 3, 16, 32)).clamp(-1, 1)
    mean, std = text_pipeline.encode_images(pipe, images)
    assert mean.shape == std.shape and mean.dtype == std.dtype == torch.float32

    posterior = pipe.vae.encode(images[:, :, None] if name == "qwen" else images).latent_dist
    for latents, as_encoded in [(mean, posterior.mean), (mean + std, posterior.mean + posterior.std)]:
        expected = (pipe.vae.decode(as_encoded).sample / 2 + 0.5).clamp(0, 1)
        expected = expected.transpose(1, 2) if name == "wan" else expected.reshape(images.shape)
        torch.testing.assert_close(decoded_by_the_pipeline(pipe, name, latents), expected, atol=1e-4, rtol=1e-3)


def test_an_image_is_a_video_of_one_frame():
    pipe, text_pipeline = make("wan")
    image = randn(2, 3, 16, 16)
    mean, std = text_pipeline.encode_images(pipe, image)
    assert mean.shape == std.shape == (2, 16, 1, 2, 2)
    assert torch.equal(mean, text_pipeline.encode_images(pipe, image[:, :, None])[0])
    with pytest.raises(ValueError, match="one frame and a multiple of 4.* but got 4 frames"):
        text_pipeline.encode_images(pipe, randn(1, 3, 4, 16, 16))


@pytest.mark.parametrize(
    "name, multiple",
    {"sd3": 1, "flux": 2, "wan": 16, "pixart": 2, "zimage": 4, "qwen": 8, "sdxl": 1, "sd15": 1}.items(),
)
def test_sizes_fit_the_latents(name, multiple):
    pipe, text_pipeline = make(name)
    assert text_pipeline.size_multiple(pipe) == multiple
    if multiple > 1:
        with pytest.raises(
            ValueError, match=rf"divisible by the {multiple} pixels of a \w+'s latents, but got 32 x 33"
        ):
            text_pipeline.encode_images(pipe, randn(1, 3, 32, 33))
    pipe.register_modules(**dict.fromkeys(text_pipeline.components))
    assert text_pipeline.size_multiple(pipe) in (multiple, 2)  # without the denoiser, patches of two latent pixels


def test_what_sdxl_is_told_about_sizes():
    pipe, text_pipeline = make("sdxl")
    sizes = ((12, 10), (1, 2), (8, 16))
    (time_ids,) = text_pipeline.size_columns(*torch.tensor(sizes)[:, None]).values()
    assert torch.equal(time_ids, pipe._get_add_time_ids(*sizes, torch.float32, text_encoder_projection_dim=32))


class MyPipeline(DDPMPipeline):
    """Of no known family."""


class MyTextPipeline(TextPipeline):
    """Knows one."""


def test_another_family_is_taught(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    with pytest.raises(ValueError) as error:
        text_pipeline_of(MyPipeline)
    assert "FluxPipeline, PixArtAlphaPipeline" in str(error.value) and "MyPipeline;" in str(error.value)
    assert "register_conditions(MyPipeline, MyTextPipeline())" in str(error.value)
    mine = MyTextPipeline()
    register_conditions(MyPipeline, mine)
    assert text_pipeline_of(MyPipeline) is mine

    class Derived(MyPipeline):
        pass

    assert text_pipeline_of(Derived) is mine
    guided = FluxText(guidance_scale=3.5)
    register_conditions(FluxPipeline, guided)  # in the place of what is known
    assert text_pipeline_of(FluxPipeline) is guided
    assert text_pipeline_of(StableDiffusion3Pipeline).component == "transformer"


@pytest.mark.parametrize("text_pipeline", [MyTextPipeline, None])
def test_refuses_what_is_no_family(text_pipeline):
    with pytest.raises(ValueError, match=r"instance of a TextPipeline, such as MyTextPipeline\(\), but got"):
        register_conditions(MyPipeline, text_pipeline)
    with pytest.raises(ValueError, match="`pipeline_class` to be a class, but got a MyTextPipeline"):
        register_conditions(MyTextPipeline(), MyTextPipeline())


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_pipelines_with_text_are_saved_and_loaded(name, tmp_path):
    pipe, text_pipeline = make(name)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert all(type(getattr(loaded, each)) is type(getattr(pipe, each)) for each in text_components(name))
    expected, columns = (text_pipeline.encode_prompts(each, PROMPTS)["prompt_embeds"] for each in (pipe, loaded))
    assert all(torch.equal(*both) for both in zip(expected, columns))
