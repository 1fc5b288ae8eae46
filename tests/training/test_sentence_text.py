"""How the pipeline of sentences is trained: its own embeddings and call, on pixels or latents."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from text_runs import EncodedPipeline, fresh_processes
from tiny_pipelines import image_vae, randn, seeded
from tiny_sentences import sentence_pipe, transformer

from diffusers_dmp import LoraExperts, SentenceToImagePipeline
from diffusers_dmp.evaluation.fashion import write_captioned_images
from diffusers_dmp.models.time_argument import time_argument_of
from diffusers_dmp.training.data import prompt_encoder
from diffusers_dmp.training.data.encoded_source import load_encoded
from diffusers_dmp.training.data.encoding_pipeline import check_vae
from diffusers_dmp.training.data.prompt_encoder import Encoder, PromptEncodingArguments
from diffusers_dmp.training.data.prompt_encoding import encode_prompts
from diffusers_dmp.training.text_pipelines import text_pipeline_of

PROMPTS = ["a photo of a dress", "an ankle boot"]


def test_calls_the_transformer_as_the_pipeline_does():
    pipeline = sentence_pipe()
    text = text_pipeline_of(SentenceToImagePipeline)
    columns = text.encode_prompts(pipeline, PROMPTS)
    noisy = [randn(2, 1, 8, 8)]

    def remember(pipe, step, timestep, tensors):
        noisy.append(tensors["latents"])
        return {}

    expected = pipeline(
        PROMPTS,
        latents=noisy[0],
        guidance_scale=1.0,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=remember,
    ).images
    assert len(noisy) == 4 and torch.equal(noisy[-1], expected)
    told = time_argument_of(pipeline.transformer)
    for step, t in enumerate(pipeline.scheduler.timesteps):
        time = told.told(t.expand(2), 1000)
        with torch.no_grad():
            velocity = text.call(pipeline.transformer, pipeline.transformer.config, noisy[step], time, columns)
        sigma, following = pipeline.scheduler.sigmas[step : step + 2]
        torch.testing.assert_close(noisy[step] + (following - sigma) * velocity, noisy[step + 1])


def test_pixels_are_their_own_latents():
    grey = randn(2, 1, 8, 8).clamp(-1, 1)
    images = grey.expand(-1, 3, -1, -1)
    text = text_pipeline_of(SentenceToImagePipeline)
    pipeline = sentence_pipe()
    mean, std = text.encode_images(pipeline, images)
    torch.testing.assert_close(mean, grey)
    assert std.shape == mean.shape and not std.any()
    assert text.size_multiple(pipeline) == 4
    pipeline.transformer = None  # as encode_prompts.py loads it
    assert torch.equal(text.encode_images(pipeline, images)[0], mean)
    mean, _ = text.encode_images(sentence_pipe(transformer(in_channels=3, out_channels=3)), images)
    assert torch.equal(mean, images)


def test_latents_of_a_vae_are_scaled():
    vae = image_vae(4)
    pipeline = sentence_pipe(transformer(in_channels=4, out_channels=4), vae=vae)
    images = torch.rand(2, 3, 8, 8, generator=seeded()) * 2 - 1
    mean, std = text_pipeline_of(pipeline).encode_images(pipeline, images)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, (latents.mean - vae.config.shift_factor) * vae.config.scaling_factor)
    torch.testing.assert_close(std, latents.std * vae.config.scaling_factor)


def test_only_families_that_denoise_pixels_go_without_a_vae():
    pipeline = sentence_pipe()
    assert check_vae(pipeline, text_pipeline_of(pipeline), 28) == 4
    with pytest.raises(ValueError, match="`resolution` to be divisible by the 4 pixels .* such as 28, but got 30"):
        check_vae(pipeline, text_pipeline_of(pipeline), 30)
    with pytest.raises(ValueError, match="`pipeline` to have a VAE"):
        check_vae(pipeline, text_pipeline_of(StableDiffusion3Pipeline), 28)


def test_a_caption_that_comes_again_is_encoded_once(monkeypatch):
    pipeline = sentence_pipe()
    encoder = Encoder(PromptEncodingArguments(resolution=8), pipeline, text_pipeline_of(pipeline), [(8, 8)])
    encoded = []
    encode_prompt = pipeline.encode_prompt
    pipeline.encode_prompt = lambda prompts: (encoded.extend(prompts), encode_prompt(prompts))[1]
    captions = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    first, again = encoder.prompts(captions), encoder.prompts(captions[::-1])
    assert encoded == PROMPTS
    expected, pooled = encode_prompt(captions)
    for row, reversed_row, embeds, mean in zip(first, again[::-1], expected, pooled, strict=True):
        torch.testing.assert_close(row, {"prompt_embeds": embeds, "pooled_prompt_embeds": mean})
        torch.testing.assert_close(reversed_row, row, rtol=0, atol=0)
    monkeypatch.setattr(prompt_encoder, "MAX_REMEMBERED", 1)
    encoder.prompts(["a dress"])
    assert list(encoder.remembered) == ["a dress"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A pipeline, and pictures with captions that it has encoded."""
    folder = tmp_path_factory.mktemp("sentences")
    pictures = np.random.default_rng(0).integers(256, size=(8, 8, 8), dtype=np.uint8)
    write_captioned_images(folder / "images" / "train.parquet", pictures, PROMPTS * 4)
    sentence_pipe().save_pretrained(folder / "pipeline")
    fresh_processes()
    encode_prompts(
        PromptEncodingArguments(
            dataset=str(folder / "images"),
            pipeline=str(folder / "pipeline"),
            resolution=8,
            output_dir=str(folder / "shards"),
        )
    )
    return EncodedPipeline("sentences", folder / "pipeline", folder / "shards"), pictures


def test_shards_hold_the_pictures_and_the_pipelines_embeddings(encoded):
    shards, pictures = encoded
    samples = load_encoded(str(shards.shards)).samples
    columns = sentence_pipe().encode_prompt(PROMPTS)
    for index, picture in enumerate(pictures):
        sample = samples[index]
        torch.testing.assert_close(sample["mean"][0, 0], torch.from_numpy(picture) / 127.5 - 1, atol=1e-6, rtol=0)
        for name, column in zip(("prompt_embeds", "pooled_prompt_embeds"), columns, strict=True):
            torch.testing.assert_close(sample[name], column[index % 2])


def test_trained_from_captions_and_loaded_again(encoded, tmp_path):
    shards, _ = encoded
    output = shards.train(
        tmp_path / "full", method="full", sample_steps=2, validation_prompts=PROMPTS, sample_inference_steps=1
    )
    trained = DiffusionPipeline.from_pretrained(output / "pipeline")
    assert type(trained) is SentenceToImagePipeline and trained.text_encoder is not None
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "latent", "generator": seeded()}
    trained.set_progress_bar_config(disable=True)
    images = trained(**call).images
    assert not torch.allclose(images, sentence_pipe()(**call | {"generator": seeded()}).images)

    lora = shards.train(tmp_path / "experts", method="lora_experts", sigma_boundaries=[0.5], rank=2)
    pipeline = sentence_pipe()
    plain = pipeline(**call | {"generator": seeded()}).images
    experts = LoraExperts.from_pretrained(lora / "loras").attach(pipeline)
    assert experts.intervals.edges == (0, 500, 1000)
    assert not torch.allclose(pipeline(**call | {"generator": seeded()}).images, plain)
    experts.detach()
    pipeline.load_lora_weights(lora / "loras", weight_name="expert_0.safetensors")
    assert not torch.allclose(pipeline(**call | {"generator": seeded()}).images, plain)
