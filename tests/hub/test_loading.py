"""One repository for all: with this package no code of the repository is executed, without it that code does."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from small_pipelines import PIPELINES, make_all

from diffusers_dmp import SNRSplitPipeline


@pytest.fixture
def site_packages(tmp_path) -> Path:
    """All that is installed but this package."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "diffusers_dmp" not in installed.name and installed.suffix != ".pth":
            (folder / installed.name).symlink_to(installed)
    return folder


def read(file: Path) -> "bytes | dict":
    if file.suffix != ".json":
        return file.read_bytes()
    config = json.loads(file.read_text())
    return {key: value for key, value in config.items() if key != "_name_or_path"}  # where it was loaded from


def upload(api: HfApi, name: str, folder: Path) -> None:
    api.create_repo(f"user/{name}")
    api.upload_folder(repo_id=f"user/{name}", folder_path=folder)


@pytest.mark.parametrize("mode", ["package", "code"])
def test_every_pipeline_over_http(hub, tmp_path, site_packages, mode):
    api = HfApi(endpoint=hub.url, token="hf_writer")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    expected = {}
    for name, pipeline in make_all().items():
        pipeline.set_progress_bar_config(disable=True)
        expected[name] = pipeline([3, 5], latents=noise, num_inference_steps=4, output_type="latent").images
        pipeline.save_pretrained(tmp_path / "saved" / name)
        upload(api, name, tmp_path / "saved" / name)
        pipeline.denoisers[0].save_pretrained(tmp_path / "models" / name)
        upload(api, f"{name}-model", tmp_path / "models" / name)

    output = tmp_path / "output"
    output.mkdir()
    environment = os.environ | hub.environment(tmp_path / "home", token="hf_writer")
    interpreter = [sys.executable]
    if mode == "code":
        environment["PYTHONPATH"] = str(site_packages)
        interpreter.append("-S")  # without what site-packages link to
    script = [Path(__file__).with_name("load_all.py"), mode, tmp_path / "noise.safetensors", output, *PIPELINES]
    result = subprocess.run([*interpreter, *map(str, script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    samples = load_file(output / "samples.safetensors")
    for name, images in expected.items():
        torch.testing.assert_close(samples[f"{name}.hub"], images)
        torch.testing.assert_close(samples[f"{name}.again"], images)
        if mode == "package":
            torch.testing.assert_close(samples[f"{name}.pushed"], images)
            assert {"pipeline.py", "model_index.json"} <= hub.repos[f"user/{name}-pushed"].files.keys()
        first, second = (
            {file.relative_to(folder): read(file) for file in folder.rglob("*") if file.is_file()}
            for folder in (tmp_path / "saved" / name, output / name)
        )
        assert first == second  # whoever saved it


def test_a_split_pipeline_as_it_was_saved_before_it_brought_code(tmp_path):
    """`_class_name` was a name only, and there were no code files."""
    PIPELINES["split"]().save_pretrained(tmp_path)
    for code in tmp_path.rglob("*.py"):
        code.unlink()
    index = tmp_path / "model_index.json"
    config = json.loads(index.read_text())
    assert config["_class_name"] == ["pipeline", "SNRSplitPipeline"]
    lists = {name: list(config[name].values()) for name in ("snr_boundaries", "prediction_types", "guidance_scales")}
    index.write_text(json.dumps(config | lists | {"_class_name": "SNRSplitPipeline"}))
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is SNRSplitPipeline
