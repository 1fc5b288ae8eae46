"""Sampling many images: the seed and its index decide each image, however many are sampled together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomised
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers import DiTTransformer2DModel as StockDiT
from PIL import Image

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.evaluation import sample
from diffusers_dmp.evaluation.fingerprint import expect_comparable
from diffusers_dmp.evaluation.sample import SamplingArguments, sample_images, sampling_settings
from diffusers_dmp.training.data import seeded_sampling
from diffusers_dmp.training.data.random_numbers import noise_settings
from diffusers_dmp.training.data.seeded_sampling import _scheduler_for, compile_for_sampling

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 1}
MODULE = "diffusers_dmp.evaluation.sample"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    """A pipeline with DDPM, whose noise at every step must be each image's own, too."""
    folder = tmp_path_factory.mktemp("pipeline")
    transformer = randomised(DiTModel(**TINY, num_classes=3))
    ClassConditionalPipeline(transformer, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def arguments(pipeline, folder, **others) -> SamplingArguments:
    small = {"num_images": 14, "batch_size": 4, "shard_size": 5, "num_inference_steps": 3, "guidance_scale": 1.5}
    return SamplingArguments(pipeline=pipeline, output_dir=str(folder), **small | others)


def read(folder) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def assert_same_images(first: Path, second: Path) -> None:
    """
    Equal up to rounding, and so at most one grey level apart.

    Other batch sizes and numbers of threads add up in another order; other random numbers would differ by many levels.
    """
    (images, labels), (other_images, other_labels) = read(first), read(second)
    assert images.shape == other_images.shape and np.array_equal(labels, other_labels)
    assert abs(images.astype(int) - other_images.astype(int)).max() <= 1


def test_the_file_has_adms_format(pipeline, tmp_path):
    path = sample_images(arguments(pipeline, tmp_path, png=True))
    assert path == tmp_path / "samples.npz"
    images, labels = read(tmp_path)
    assert images.shape == (14, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2] * 4 + [0, 1]
    assert len({image.tobytes() for image in images}) == 14
    written = sorted((tmp_path / "png").glob("*.png"))
    assert [path.name for path in written] == [f"{index:06d}.png" for index in range(14)]
    assert np.array_equal(np.asarray(Image.open(written[9]).convert("RGB")), images[9])
    settings = json.loads((tmp_path / "sampling.json").read_text())
    assert (settings["guidance_scale"], settings["scheduler"]) == (1.5, "DDPMScheduler, leading")
    assert settings["vae_sha256"] is None and settings["device"] == "cpu"


def test_a_model_of_one_class_has_no_labels(tmp_path):
    transformer = randomised(DiTModel(**TINY, num_classes=1))
    ClassConditionalPipeline(transformer, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    sample_images(arguments(str(tmp_path / "pipeline"), tmp_path, num_images=3, guidance_scale=1.0))
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"] and len(file["arr_0"]) == 3


def test_the_settings_of_a_solver_are_recorded(pipeline):
    """Its name alone does not tell solvers of different orders apart."""
    hashes = set()
    for order in (2, 3):
        scheduler = DPMSolverMultistepScheduler(solver_order=order)
        loaded = ClassConditionalPipeline.from_pretrained(pipeline, scheduler=scheduler)
        settings = sampling_settings(arguments(pipeline, ""), loaded, Path(pipeline))
        hashes.add(settings["scheduler_sha256"])
    assert len(hashes) == 2


def test_the_batch_size_changes_images_by_rounding_only(pipeline, tmp_path):
    sample_images(arguments(pipeline, tmp_path / "together"))
    sample_images(arguments(pipeline, tmp_path / "alone", batch_size=1))
    assert_same_images(tmp_path / "together", tmp_path / "alone")


def test_more_images_begin_with_the_same(pipeline, tmp_path):
    sample_images(arguments(pipeline, tmp_path / "more", num_images=20))
    sample_images(arguments(pipeline, tmp_path / "fewer", num_images=10))
    assert np.array_equal(read(tmp_path / "more")[0][:10], read(tmp_path / "fewer")[0])


def test_any_pipeline(tmp_path):
    """A pipeline of Diffusers without classes gives images without labels."""
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    settings = {"num_images": 3, "guidance_scale": None}
    sample_images(arguments(str(tmp_path / "ddpm"), tmp_path / "samples", **settings))
    with np.load(tmp_path / "samples" / "samples.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize(("beta_schedule", "spacing"), [("squaredcos_cap_v2", "leading"), ("linear", "linspace")])
def test_where_a_solver_begins(beta_schedule, spacing):
    """Diffusers' own pipelines do not choose it: on a cosine schedule the scheduler is told to begin before pure noise."""
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, clip_sample=False)
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    stock, own = DDPMPipeline(unet, scheduler), ClassConditionalPipeline(randomised(DiTModel(**TINY)), scheduler)
    made = [_scheduler_for(pipeline, "DPMSolverMultistepScheduler") for pipeline in (stock, own)]
    assert [each.config.timestep_spacing for each in made] == [spacing, "linspace"]


def test_another_model_in_the_same_place_is_refused(tmp_path):
    """After a second training into the same folder, the images in `output_dir` are the first model's."""
    for seed in range(2):
        transformer = randomised(DiTModel(**TINY, num_classes=3), seed)
        ClassConditionalPipeline(transformer, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
        settings = arguments(str(tmp_path / "pipeline"), tmp_path / "samples", num_images=2)
        if seed == 0:
            sample_images(settings)
    with pytest.raises(ValueError, match="Expected `pipeline_sha256` to be"):
        sample_images(settings)


@pytest.mark.parametrize("choice", [{"dtype": "bfloat16"}, {"tf32": True}])
def test_images_of_another_precision_are_refused(pipeline, tmp_path, monkeypatch, choice):
    """Neither are they mixed in a folder, nor are their metrics compared."""
    monkeypatch.setattr(sample, "check_tf32", lambda device: None)
    ((name, value),) = choice.items()
    settings = []
    for folder, chosen in (("plain", {}), ("other", choice)):
        sample_images(arguments(pipeline, tmp_path / folder, num_images=2, **chosen))
        settings.append(json.loads((tmp_path / folder / "sampling.json").read_text()))
    assert settings[1][name] == value
    with pytest.raises(ValueError, match=f"measured alike, but got others in {name} "):
        expect_comparable(*settings)
    with pytest.raises(ValueError, match=f"Expected `{name}` to be .*, but got {value!r}"):
        sample_images(arguments(pipeline, tmp_path / "plain", num_images=2, **choice))
    expect_comparable(settings[0], settings[0])


def test_noise_of_another_way_is_refused(pipeline, tmp_path, monkeypatch):
    """As on a GPU in a folder of an older version, whose images had other bits."""
    sample_images(arguments(pipeline, tmp_path, num_images=2))
    monkeypatch.setattr(sample, "noise_settings", lambda device: noise_settings(torch.device("cuda")))
    with pytest.raises(
        ValueError, match="Expected `noise` to be None, as in the images .* 'of several steps at once'"
    ):
        sample_images(arguments(pipeline, tmp_path, num_images=2))


def test_a_pipeline_is_compiled_as_it_can_be(caplog, monkeypatch):
    """By itself, by its denoisers' repeated blocks, or not at all, which a line says."""

    def without_compiler(device):
        raise ValueError("Expected a compiler.")

    monkeypatch.setattr(seeded_sampling, "check_compiler", without_compiler)
    calls = []
    assert compile_for_sampling(SimpleNamespace(compile=lambda: calls.append("pipeline")))
    assert calls == ["pipeline"]
    # Diffusers' own have no `compile`
    transformer = StockDiT(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, in_channels=4)
    transformer._repeated_blocks = ["BasicTransformerBlock"]
    stock = DiTPipeline(transformer, AutoencoderKL(), DDPMScheduler())
    assert not compile_for_sampling(stock)
    (record,) = caplog.records
    assert record.getMessage() == "The DiTPipeline is not compiled. Expected a compiler."
    assert not any(block._compiled_call_impl for block in transformer.transformer_blocks)
    caplog.clear()
    monkeypatch.setattr(seeded_sampling, "check_compiler", lambda device: None)
    assert compile_for_sampling(stock)
    assert all(block._compiled_call_impl is not None for block in transformer.transformer_blocks)
    assert not caplog.records
    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    assert not compile_for_sampling(DDPMPipeline(unet, DDPMScheduler()))
    (record,) = caplog.records
    assert record.getMessage().startswith("The DDPMPipeline is not compiled: ")


def test_compiled_images_may_be_added_to_others(pipeline, tmp_path, monkeypatch):
    """Compilation changes images by rounding only, as the batch size does; it comes after experts are attached."""
    compiled = []
    monkeypatch.setattr(sample, "compile_for_sampling", compiled.append)
    sample_images(arguments(pipeline, tmp_path))
    assert not compiled
    next((tmp_path / "shards").iterdir()).unlink()
    sample_images(arguments(pipeline, tmp_path, compile=True))
    assert len(compiled) == 1 and "compile" not in json.loads((tmp_path / "sampling.json").read_text())


def test_images_of_other_settings_are_refused(pipeline, tmp_path):
    sample_images(arguments(pipeline, tmp_path, num_images=2))
    with pytest.raises(ValueError, match="`guidance_scale` to be 1.5, .* but got 3.0"):
        sample_images(arguments(pipeline, tmp_path, num_images=2, guidance_scale=3.0))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"num_images": 0}, "`num_images` to be at least 1, but got 0"),
        ({"scheduler": "utils"}, "`scheduler` to be one of DDIM, .*, but got 'utils'"),
        ({"seed": -1}, "`seed` to be at least 0, but got -1"),
        ({"dtype": "float8"}, "`dtype` to be one of float32, float16, bfloat16, but got 'float8'"),
    ],
)
def test_bad_arguments(pipeline, tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said):
        arguments(pipeline, tmp_path, **wrong)
    with pytest.raises(ValueError, match="`pipeline` to be a folder or Hub id, but got nothing"):
        arguments("", tmp_path)


def launch(pipeline, folder, num_processes: int, **others) -> list[str]:
    args = vars(arguments(pipeline, folder, **others))
    pairs = [f"--{name}={value}" for name, value in args.items() if value is not None]
    several = ["--multi_gpu"] if num_processes > 1 else []
    return [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
            "--dynamo_backend", "no", "--num_processes", str(num_processes), *several, "-m", MODULE, *pairs]  # fmt: skip


@pytest.mark.slow
def test_two_processes_write_the_images_of_one(pipeline, tmp_path):
    for number in (1, 2):
        command = launch(pipeline, tmp_path / str(number), number)
        result = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"}
        )
        assert result.returncode == 0, result.stderr
    assert_same_images(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_a_killed_run_continues(pipeline, tmp_path):
    many = {"num_images": 60, "num_inference_steps": 60}
    process = subprocess.Popen(launch(pipeline, tmp_path / "killed", 1, **many), start_new_session=True)
    shards = tmp_path / "killed" / "shards"
    while not list(shards.glob("*.parquet")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shards_before = {path: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert 0 < len(shards_before) < 12 and not (tmp_path / "killed" / "samples.npz").exists()
    sample_images(arguments(pipeline, tmp_path / "killed", **many))
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in shards_before.items())
    sample_images(arguments(pipeline, tmp_path / "whole", **many))
    assert_same_images(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("choice", "said"), [({"tf32": True}, "`tf32` on a GPU that has it"), ({"dtype": "bfloat16"}, "no bfloat16")]
)
def test_what_the_device_has_not_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, choice, said):
    monkeypatch.setattr(sample, "check_dtype", refuse_bfloat16)
    with pytest.raises(ValueError, match=said):
        sample_images(arguments("missing/pipeline", tmp_path / "samples", **choice))
    assert not (tmp_path / "samples").exists()


def refuse_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    """As on a GPU that has none."""
    if dtype == torch.bfloat16:
        raise ValueError("no bfloat16")
