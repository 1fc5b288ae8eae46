"""From images and captions through shards to a prediction: training's call of the denoiser, for each family."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_text_pipelines import PROMPTS, conditions_of
from tiny_pipelines import RECIPES, randn
from tiny_text import with_text

from diffusers_dmp.training.conditions import TextConditions
from diffusers_dmp.training.data.encoded_rows import collate
from diffusers_dmp.training.data.encoded_text import load_encoded
from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts
from diffusers_dmp.training.denoiser import TextDenoiser
from diffusers_dmp.training.text_pipelines import text_pipeline_of

SIZES = ((48, 40), (3, 0), (32, 32))  # before resizing, what is cut off at the top and at the left, and after


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(index).integers(0, 256, (*SIZES[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(prompt)
    return folder


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_shards_give_what_the_denoiser_is_called_with(name, images, tmp_path):
    denoiser = RECIPES[name].denoiser()
    pipe = with_text(name, RECIPES[name].pipe(denoiser))
    text_pipeline = text_pipeline_of(pipe)
    encode_prompts(PromptEncodingArguments(dataset=str(images), resolution=32, output_dir=str(tmp_path)), pipe)
    encoded = load_encoded(str(tmp_path))
    batch = collate([encoded.samples[index] for index in range(2)])
    call = TextDenoiser(text_pipeline.call, denoiser, 1000)
    x_t, timesteps = randn(2, *call.shape_of(batch)), torch.tensor([900.0, 400.0])

    def predict(conditions, samples=slice(None)):
        return call(denoiser, x_t[samples], timesteps[samples], conditions).sample

    conditions = TextConditions(encoded.empty_prompt, 0.5)
    expected = predict(conditions_of(text_pipeline, pipe, sizes=SIZES))
    torch.testing.assert_close(predict(conditions(batch, torch.tensor([0.9, 0.9]))), expected)
    dropped = predict(conditions(batch, torch.tensor([0.1, 0.9])))  # the first caption
    torch.testing.assert_close(dropped[1], expected[1], atol=1e-5, rtol=1e-4)
    unconditional = predict(conditions_of(text_pipeline, pipe, [""], SIZES), slice(1))
    assert (dropped[:1] - unconditional).abs().max() < 0.01 * (expected[:1] - unconditional).abs().max()
