"""Sampling from prompts with real pipelines of text: prompt, seed and index decide each image."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from peft import LoraConfig
from tiny_pipelines import RECIPES, sd3, sd3_pipe
from tiny_text import with_text

from diffusers_dmp import LoraExperts, NoiseIntervals
from diffusers_dmp.evaluation.sample import SamplingArguments, sample_images
from diffusers_dmp.training.data.seeded_sampling import sample_seeded

PROMPTS = ["a red cat", "a blue dog on the moon", "three"]
TEXT_PARTS = {
    "sd3": ("context_embedder", "text_embedder"),
    "sd15": ("attn2", "proj_out", "conv_out"),
    "wan": ("text_embedder", "attn2", "proj_out"),
}
SIZES = {"sd3": (8, 16), "sd15": (8, 16), "wan": (16, 16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pipelines of text with their encoders, and a file of prompts."""
    folder = tmp_path_factory.mktemp("text")
    for name in SIZES:
        with_text(name, RECIPES[name].pipe(attentive(name))).save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def attentive(name: str) -> torch.nn.Module:
    """A denoiser to which the prompt matters more than it does with small random weights."""
    denoiser = RECIPES[name].denoiser()
    with torch.no_grad():
        for parameter_name, parameter in denoiser.named_parameters():
            if any(part in parameter_name for part in TEXT_PARTS[name]):
                parameter.mul_(20)
    return denoiser


def arguments(folder: Path, output: Path, name: str = "sd3", **others) -> SamplingArguments:
    height, width = SIZES[name]
    small = {"num_images": 5, "batch_size": 3, "shard_size": 4, "num_inference_steps": 2}
    small |= {"pipeline": str(folder / name), "prompts": str(folder / "prompts.txt"), "output_dir": str(output)}
    return SamplingArguments(**small | {"height": height, "width": width} | others)


def sample(folder: Path, output: Path, name: str = "sd3", **others) -> np.ndarray:
    with np.load(sample_images(arguments(folder, output, name, **others))) as file:
        assert file.files == ["arr_0"]
        return file["arr_0"].astype(int)


def by_hand(pipeline: DiffusionPipeline, index: int, prompts: list[str] = PROMPTS, **call) -> np.ndarray:
    """Image `index` of seed 0, alone."""
    state = np.random.SeedSequence([0, index]).generate_state(1, np.uint64).item()
    pipeline.set_progress_bar_config(disable=True)
    call |= {"generator": torch.Generator().manual_seed(state), "output_type": "pil"}
    output = pipeline(prompts[index % len(prompts)], num_inference_steps=2, **call)
    image = output.images[0] if hasattr(output, "images") else output.frames[0][0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", SIZES)
def test_prompt_seed_and_index_decide_each_image(name, folder, tmp_path):
    """Whatever the batch size; of a video, the first of its frames."""
    height, width = SIZES[name]
    images = sample(folder, tmp_path / "three", name)
    alone = sample(folder, tmp_path / "one", name, batch_size=1)
    assert images.shape == (5, height, width, 3) and abs(images - alone).max() <= 1
    pipeline = DiffusionPipeline.from_pretrained(folder / name)
    frames = {"num_frames": 1} if name == "wan" else {}
    for index in (1, 3):
        expected = by_hand(pipeline, index, height=height, width=width, **frames)
        assert abs(images[index] - expected).max() <= 1
    other = by_hand(pipeline, 1, ["something else"], height=height, width=width, **frames)
    assert abs(images[1] - other).max() > 1
    assert not np.array_equal(images[0], images[3])  # of the same prompt


def test_what_is_written_beside_the_images(folder, tmp_path):
    sample(folder, tmp_path, png=True)
    assert json.loads((tmp_path / "prompts.json").read_text()) == PROMPTS
    settings = json.loads((tmp_path / "sampling.json").read_text())
    assert settings["prompts_sha256"] == hashlib.sha256(json.dumps(PROMPTS).encode()).hexdigest()
    assert (settings["prompts"], settings["num_prompts"], settings["guidance_scale"]) == ("prompts.txt", 3, 7.0)
    assert len(list((tmp_path / "png").iterdir())) == 5


def test_an_interrupted_run_writes_the_same_files(folder, tmp_path):
    sample(folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "shards" / "train-00001-of-00002.parquet").unlink()
    (tmp_path / "samples.npz").unlink()
    sample(folder, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_prompts_in_the_same_folder_are_refused(folder, tmp_path):
    sample(folder, tmp_path / "samples", num_images=2)
    (tmp_path / "prompts.txt").write_text("a red cat\nanother\n")
    with pytest.raises(ValueError, match="Expected `prompts_sha256` to be"):
        sample(folder, tmp_path / "samples", num_images=2, prompts=str(tmp_path / "prompts.txt"))


def test_a_negative_prompt_and_further_arguments(folder, tmp_path):
    """One negative prompt serves all prompts of a batch."""
    further = {"negative_prompt": "grey", "guidance_scale": 4.0}
    images = sample(folder, tmp_path, pipeline_arguments=json.dumps(further))
    pipeline = DiffusionPipeline.from_pretrained(folder / "sd3")
    assert abs(images[2] - by_hand(pipeline, 2, height=8, width=16, **further)).max() <= 1
    assert json.loads((tmp_path / "sampling.json").read_text())["pipeline_arguments"] == further


def save_experts(folder: Path, seed: int) -> None:
    transformer = sd3()
    for name in ("low", "high"):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), name)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    experts = LoraExperts(["low", "high"], NoiseIntervals.from_sigmas([0.8])).attach(sd3_pipe(transformer))
    experts.save_pretrained(folder)


def test_lora_experts(folder, tmp_path):
    """They act as they do when attached by hand, and other experts in the same place are refused."""
    save_experts(tmp_path / "experts", seed=1)
    given = {"lora_experts": str(tmp_path / "experts"), "num_images": 2}
    images = sample(folder, tmp_path / "samples", **given)
    pipeline = DiffusionPipeline.from_pretrained(folder / "sd3")
    without = by_hand(pipeline, 1, height=8, width=16)
    LoraExperts.from_pretrained(tmp_path / "experts").attach(pipeline)
    assert abs(images[1] - by_hand(pipeline, 1, height=8, width=16)).max() <= 1
    assert abs(images[1] - without).max() > 1
    save_experts(tmp_path / "experts", seed=2)
    with pytest.raises(ValueError, match="Expected `lora_experts_sha256` to be"):
        sample(folder, tmp_path / "samples", **given)


def test_random_numbers_that_a_batch_shares(folder, tmp_path):
    """Some schedulers take noise from PyTorch's global generator: refused for several images, seeded for one."""
    pipeline = DiffusionPipeline.from_pretrained(folder / "sd3")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pipeline.set_progress_bar_config(disable=True)

    def images(*indices: int) -> list[np.ndarray]:
        call = {"prompt": PROMPTS[: len(indices)], "height": 8, "width": 8, "num_inference_steps": 2}
        return [np.asarray(image) for image in sample_seeded(pipeline, 0, indices, **call)]

    with pytest.raises(ValueError, match="its own, but got a StableDiffusion3Pipeline .*`--batch_size 1`"):
        images(0, 1)
    state = torch.get_rng_state()
    first, (second,) = images(0), images(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert np.array_equal(images(1)[0], second) and not np.array_equal(first[0], second)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"prompts": None},
            "Expected `prompts` for a StableDiffusion3Pipeline, .*one prompt in each line, but got nothing",
        ),
        ({"pipeline_arguments": '{"true_cfg": 4}'}, "StableDiffusion3Pipeline's call, prompt_2, .*, but got true_cfg"),
        ({"pipeline_arguments": '{"generator": 4}'}, "but got generator"),
        ({"guidance_channels": 3}, "but got guidance_channels"),
        ({"lora_experts": "."}, "lora_experts.json"),
    ],
)
def test_arguments_that_do_not_fit_the_pipeline(wrong, said, folder, tmp_path):
    with pytest.raises((ValueError, OSError), match=said):
        sample(folder, tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"height": 0}, "`height` to be at least 1, but got 0"),
        ({"pipeline_arguments": "[1]"}, r"`pipeline_arguments` to be a JSON object such as .*, but got '\[1\]'"),
        ({"pipeline_arguments": "{"}, "`pipeline_arguments` to be a JSON object"),
        ({"lora_experts": "./missing"}, "`lora_experts` to be an existing folder or a Hub id, but got './missing'"),
    ],
)
def test_bad_arguments(wrong, said, folder, tmp_path):
    with pytest.raises(ValueError, match=said):
        arguments(folder, tmp_path, **wrong)


def test_prompts_for_a_pipeline_without(folder, tmp_path):
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    settings = {"pipeline": str(tmp_path / "ddpm"), "height": None, "width": None}
    with pytest.raises(ValueError, match="Expected no `prompts` for a DDPMPipeline, which is not called with prompts"):
        sample(folder, tmp_path / "samples", **settings)
    with pytest.raises(ValueError, match="DDPMPipeline's call, batch_size, num_inference_steps, but got height"):
        sample(folder, tmp_path / "samples", **settings | {"prompts": None, "height": 8})
