"""PPAP's images, which a diffusion model itself generates: with and without prompts, each by seed and index alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import randomised
from datasets import load_dataset
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from guidance_data import generate, save_unconditional
from runs import launch_script
from tiny_pipelines import RECIPES
from tiny_text import with_text

from diffusers_dmp import ClassConditionalPipeline, PatchedUNet2DModel
from diffusers_dmp.training.data.requests import CallArguments
from diffusers_dmp.training.data.seeded_sampling import sample_seeded


@pytest.fixture
def pipeline(tmp_path) -> Path:
    return save_unconditional(tmp_path / "pipeline")


def grey_levels(images: list, others: list) -> int:
    """The largest difference between two lists of images, in 8-bit grey levels."""
    pixels, other_pixels = (np.stack([np.asarray(image, dtype=int) for image in each]) for each in (images, others))
    return np.abs(pixels - other_pixels).max()


def assert_alike(images: list, others: list) -> None:
    """Equal up to rounding: float32's in another batch or thread may take a pixel to the next grey level."""
    assert grey_levels(images, others) <= 1


# Without prompts


def test_images_depend_on_seed_and_index_alone(pipeline, tmp_path):
    images = generate(pipeline, tmp_path / "one")["image"]
    assert len(images) == 10 and images[0].size == (8, 8)
    assert_alike(generate(pipeline, tmp_path / "two", batch_size=3)["image"], images)
    assert grey_levels(images[:1], images[1:2]) > 10


def test_generating_goes_on_where_it_was(pipeline, tmp_path):
    images = generate(pipeline, tmp_path / "run")["image"]
    first, second = sorted((tmp_path / "run").glob("*.parquet"))
    kept, lost = first.read_bytes(), second.read_bytes()
    second.unlink()
    before = first.stat().st_mtime_ns
    again = generate(pipeline, tmp_path / "run")["image"]
    assert first.stat().st_mtime_ns == before and first.read_bytes() == kept and second.read_bytes() == lost
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    with pytest.raises(
        ValueError,
        match="`num_inference_steps` to be 2, as in the images that .* holds, but got 3; write into another folder",
    ):
        generate(pipeline, tmp_path / "run", num_inference_steps=3)


@pytest.mark.slow
def test_generating_on_two_processes(pipeline, tmp_path):
    images = generate(pipeline, tmp_path / "one")["image"]
    arguments = {"pipeline": pipeline, "num_images": 10, "batch_size": 4, "shard_size": 6, "num_inference_steps": 2}
    launch_script("generate_guidance_data.py", tmp_path / "two", 2, arguments)
    assert_alike(load_dataset(str(tmp_path / "two"), split="train")["image"], images)


def test_generating_with_diffusers_own_pipeline(tmp_path):
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       norm_num_groups=4, layers_per_block=1)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    images = generate(tmp_path / "ddpm", tmp_path / "run", scheduler="")["image"]
    assert images[9].mode == "RGB"


def test_pairs_of_resolutions(tmp_path):
    """The second pipeline enlarges the images of the first: of 4 pixels to 8."""
    unet = UNet2DModel(4, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       norm_num_groups=4, layers_per_block=1)  # fmt: skip
    DDPMPipeline(randomised(unet), DDPMScheduler()).save_pretrained(tmp_path / "small")
    sizes = {"model_channels": 32, "channel_multipliers": (1,), "attention_levels": (), "attention_head_dim": 16}
    model = PatchedUNet2DModel(sample_size=8, patch_size=2, in_channels=3, low_res_channels=3, **sizes)
    ClassConditionalPipeline(randomised(model), DDIMScheduler()).save_pretrained(tmp_path / "large")
    arguments = {"super_resolution_pipeline": str(tmp_path / "large"), "num_images": 5}
    pairs = generate(tmp_path / "small", tmp_path / "run", **arguments)
    assert pairs[0]["image"].size == (4, 4) and pairs[0]["teacher_image"].size == (8, 8)
    enlarging = DiffusionPipeline.from_pretrained(tmp_path / "large")
    enlarging.set_progress_bar_config(disable=True)
    alone = sample_seeded(enlarging, 0, [4], image=[pairs[4]["image"]], num_inference_steps=2)
    assert_alike([pairs[4]["teacher_image"]], alone)


# From prompts


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory) -> Path:
    """A pipeline of text with its encoders, and a file of prompts."""
    folder = tmp_path_factory.mktemp("text")
    with_text("sd3", RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())).save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("a red cat\na blue dog\nthree\n")
    return folder


def generate_of_text(folder: Path, output_dir: Path, **arguments) -> list[np.ndarray]:
    defaults = {"prompts": str(folder / "prompts.txt"), "num_images": 5, "batch_size": 3, "shard_size": 3, "height": 8,
                "width": 8}  # fmt: skip
    found = generate(folder / "sd3", output_dir, **defaults | arguments)["image"]
    return [np.asarray(image).astype(int) for image in found]


def test_any_pipeline_of_text_generates(text_pipeline, tmp_path):
    """Prompt, seed and index decide each image; a pipeline of flow matching samples by its own scheduler."""
    images = generate_of_text(text_pipeline, tmp_path / "run", guidance_scale=4.0)
    alone = generate_of_text(text_pipeline, tmp_path / "alone", guidance_scale=4.0, batch_size=1)
    assert np.abs(np.stack(images) - np.stack(alone)).max() <= 1
    pipeline = DiffusionPipeline.from_pretrained(text_pipeline / "sd3")
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 8, "width": 8, "guidance_scale": 4.0}
    (expected,) = sample_seeded(pipeline, 0, [4], prompt=["a blue dog"], **call)
    assert np.abs(images[4] - np.asarray(expected).astype(int)).max() <= 1
    # an interrupted run goes on, with the same prompts only
    lost = sorted((tmp_path / "run").glob("*.parquet"))[1]
    content = lost.read_bytes()
    lost.unlink()
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(ValueError, match="`prompts_sha256` to be"):
        generate_of_text(text_pipeline, tmp_path / "run", guidance_scale=4.0, prompts=str(tmp_path / "prompts.txt"))
    generate_of_text(text_pipeline, tmp_path / "run", guidance_scale=4.0)
    assert lost.read_bytes() == content


def test_one_prompt_for_all_images(text_pipeline, tmp_path):
    """As the preset for DeepFloyd-IF has it."""
    arguments = {"prompts": None, "pipeline_arguments": '{"prompt": ""}', "num_images": 2}
    images = generate_of_text(text_pipeline, tmp_path / "run", **arguments)
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog")
    others = generate_of_text(text_pipeline, tmp_path / "other", num_images=2, prompts=str(tmp_path / "prompts.txt"))
    assert np.abs(images[0] - others[0]).max() > 0


def test_a_folder_that_an_older_version_wrote_goes_on(pipeline, tmp_path):
    images = generate(pipeline, tmp_path / "run")["image"]
    record = tmp_path / "run" / "generation.json"
    settings = json.loads(record.read_text())
    new = [field.name for field in dataclasses.fields(CallArguments) if field.name != "pipeline_arguments"]
    older = {name: value for name, value in settings.items() if name not in new}
    assert older == {
        "pipeline": str(pipeline), "super_resolution_pipeline": None, "num_images": 10, "shard_size": 6, "seed": 0,
        "num_inference_steps": 2, "scheduler": "DDIMScheduler", "pipeline_arguments": "{}", "dtype": "float32",
    }  # fmt: skip
    record.write_text(json.dumps(older))
    sorted((tmp_path / "run").glob("*.parquet"))[0].unlink()
    assert_alike(generate(pipeline, tmp_path / "run")["image"], images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": None}, "Expected `prompts` for a StableDiffusion3Pipeline, a file with one prompt in each line"),
        ({"pipeline_arguments": '{"prompt": ""}'}, "either `prompts` or the `prompt` of `pipeline_arguments`"),
        ({"pipeline_arguments": '{"true_cfg": 4}'}, "StableDiffusion3Pipeline's call, prompt_2, .*, but got true_cfg"),
        ({"pipeline_arguments": "4"}, "`pipeline_arguments` to be a JSON object"),
        ({"height": 0}, "`height` to be at least 1"),
        (
            {"scheduler": "DDIM"},
            "a FlowMatchEulerDiscreteScheduler, but got a DDIMScheduler: only one of them is for flow",
        ),
    ],
)
def test_generation_arguments_that_do_not_fit_the_pipeline(text_pipeline, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_of_text(text_pipeline, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_prompts_for_a_pipeline_without(pipeline, text_pipeline, tmp_path):
    with pytest.raises(ValueError, match="no `prompts` for a ClassConditionalPipeline"):
        generate(pipeline, tmp_path / "run", prompts=str(text_pipeline / "prompts.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "`num_images` to be at least 1"),
        ({"scheduler": "Heun"}, "one of DDIM, .*, but got 'Heun'"),
    ],
)
def test_generation_arguments_out_of_range(pipeline, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, tmp_path / "run", **arguments)
