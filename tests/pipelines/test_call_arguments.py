"""The arguments of a pipeline's call fit together, or are refused before the first step."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from diffusers_dmp import ClassConditionalPipeline, DiTModel, SNRSplitPipeline

LATENTS = {"num_inference_steps": 2, "output_type": "latent"}


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def make_pipeline(**config) -> ClassConditionalPipeline:
    # classes called 1 to 10: the class "2" has the index 1
    pipeline = ClassConditionalPipeline(
        randomised(DiTModel(**TINY_CONFIG | config)), DDIMScheduler(), id2label={i: str(i + 1) for i in range(10)}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> ClassConditionalPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def split() -> SNRSplitPipeline:
    denoisers = [randomised(DiTModel(**TINY_CONFIG), seed) for seed in range(2)]
    pipeline = SNRSplitPipeline(denoisers, DDIMScheduler(), [1.0])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name, index", [("2", 1), ("10", 9), ("1", 0), (np.str_("3"), 2)])
def test_a_class_called_by_a_number(pipeline, tmp_path, name, index):
    expected = pipeline(index, **LATENTS, generator=generators(1)).images
    assert torch.equal(pipeline(name, **LATENTS, generator=generators(1)).images, expected)
    pipeline.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "model_index.json").read_text())["id2label"])[1] == "1"
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.get_label_ids([name, "1"]) == [index, 0]
    assert list(loaded.config.id2label) == [str(i) for i in range(10)]


def test_a_single_label_is_for_the_whole_batch(pipeline):
    expected = pipeline([4, 4, 4], **LATENTS, generator=generators(3)).images
    for label in (4, "5", np.int64(4), torch.tensor(4)):
        assert torch.equal(pipeline(label, batch_size=3, **LATENTS, generator=generators(3)).images, expected)
    assert torch.equal(
        pipeline([4, 4, 4], batch_size=np.int64(3), **LATENTS, generator=generators(3)).images, expected
    )


def test_images_per_label(pipeline, split):
    for each in (pipeline, split):
        expected = each([1, 1, 7, 7], **LATENTS, generator=generators(4)).images
        images = each([1, 7], num_images_per_label=2, **LATENTS, generator=generators(4)).images
        assert torch.equal(images, expected)
    # everything that is given one by one is given for each image
    noise = torch.randn(4, 4, 8, 8)
    images = pipeline([1, 7], num_images_per_label=2, latents=noise, guidance_scale=[1.0, 2, 3, 4], **LATENTS).images
    last = pipeline(7, latents=noise[3:], guidance_scale=4.0, **LATENTS).images
    torch.testing.assert_close(images[3:], last, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [0], "batch_size": 3}, "one label, or a list of the 3 of `batch_size`, but got a list of 1"),
        ({"class_labels": [0, 1], "batch_size": 1}, "list of the 1 of `batch_size`, but got a list of 2"),
        ({"class_labels": [0, 1], "generator": generators(3)}, "`generator` to be one or a list of 2, but got 3"),
        ({"class_labels": [0, 1], "latents": torch.zeros(3, 4, 8, 8)}, r"shape \(2, 4, 8, 8\).*\(3, 4, 8, 8\)"),
        ({"class_labels": [0], "latents": np.zeros((1, 4, 8, 8))}, "`latents` to be a tensor.*ndarray"),
        ({"class_labels": [0, 1], "guidance_scale": [1.0, 2.0, 3.0]}, "`guidance_scale`.*2 of them, but got 3"),
        ({"class_labels": [0], "guidance_scale": float("nan")}, "`guidance_scale` to be finite"),
        ({"class_labels": [0], "guidance_scale": "x"}, "`guidance_scale` to be a number or 1 of them, but got 'x'"),
        ({"class_labels": [0], "guidance_scale": None}, "`guidance_scale` to be a number or 1 of them, but got None"),
        ({"class_labels": [0], "generator": 5}, "`generator` to be a `torch.Generator` or a list of them, but got 5"),
        ({"num_inference_steps": 1001}, "`num_inference_steps` to be at most 1000 for a DDIMScheduler, but got 1001"),
        ({"class_labels": 0, "num_images_per_label": 2, "generator": generators(1)}, "list of 2, but got 1"),
        ({"num_images_per_label": 2}, "`class_labels` for `num_images_per_label` 2, but got none"),
        ({"class_labels": 0, "num_images_per_label": 0}, "`num_images_per_label` to be an integer of at least 1"),
        ({"class_labels": [True]}, "integers or names"),
        ({"class_labels": [[0, 1]]}, "integers or names"),
        ({"class_labels": 11}, r"in \[0, 10\], but got \[11\]\. The index 10 is the null class"),
        (
            {"class_labels": [0, 1], "generator": tuple(generators(3))},
            "`generator` to be one or a list of 2, but got 3",
        ),
        ({"height": 8.0}, "`height` to be an integer of at least 1, but got 8.0"),
        ({"width": 0}, "`width` to be an integer of at least 1, but got 0"),
        *(({"batch_size": value}, "`batch_size` to be an integer of at least 1") for value in (0, -1, 1.0, True, "2")),
        *(
            ({"num_inference_steps": value}, "`num_inference_steps` to be an integer of at least 1")
            for value in (0, -5, 2.5, None, True)
        ),
        *(
            ({"timesteps": value}, "`timesteps` to be one or more descending numbers")
            for value in ([], [1, 900], [500, 500], 500, ["9", "1"], [[900], [1]], np.array([]))
        ),
    ],
)
def test_refused_before_the_first_step(pipeline, arguments, message):
    def step(*args):
        raise AssertionError("Expected no step to be made.")

    with pytest.raises(ValueError, match=message):
        pipeline(**{"num_inference_steps": 2} | arguments, callback_on_step_end=step)


def test_a_model_without_a_null_class_says_so():
    with pytest.raises(ValueError, match=r"`class_labels` to be in \[0, 9\], but got \[10\]\.$"):
        make_pipeline(class_dropout_prob=0.0)(10)


def test_numpy_and_torch_numbers(pipeline, split):
    expected = pipeline([1, 2], guidance_scale=[2.0, 3.0], **LATENTS, generator=generators(2)).images
    arguments = {"num_inference_steps": np.int64(2), "output_type": "latent", "generator": generators(2)}
    images = pipeline(np.array([1, 2]), guidance_scale=np.array([2.0, 3.0]), **arguments).images
    assert torch.equal(images, expected)

    expected = split([1, 2], guidance_scale=[2.0, 3.0], **LATENTS, generator=generators(2)).images
    arguments["generator"] = generators(2)
    assert torch.equal(split([1, 2], guidance_scale=np.array([2.0, 3.0]), **arguments).images, expected)
    assert sum(split.steps_per_denoiser(np.int64(7))) == 7
    with pytest.raises(ValueError, match="`num_inference_steps` to be an integer"):
        split.steps_per_denoiser(0)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_timesteps_may_be_arrays(make):
    pipeline = make_pipeline()
    pipeline.scheduler = DDPMScheduler()
    arguments = {"output_type": "latent", "class_labels": [1]}
    expected = pipeline(timesteps=[900, 400, 0], generator=torch.Generator().manual_seed(0), **arguments).images
    images = pipeline(timesteps=make([900, 400, 0]), generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.equal(images, expected)


def test_a_model_is_given_a_label_for_each_sample():
    with pytest.raises(ValueError, match=r"one for each of 2 samples, but got the shape \(1,\)"):
        DiTModel(**TINY_CONFIG)(torch.zeros(2, 4, 8, 8), 1, torch.tensor([1]))
