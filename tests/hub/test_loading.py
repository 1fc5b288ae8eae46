"""One repository for everybody: with this package none of its code is executed, without it that code loads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from small_pipelines import PIPELINES, SD3_CALL, make_all, sd3_experts

from diffusers_dmp import SNRSplitPipeline
from diffusers_dmp.hub.publishing import publish
from diffusers_dmp.saving.mixins import VERSION_KEY


@pytest.fixture
def site_packages(tmp_path) -> Path:
    """A folder with everything that is installed except this package."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for installed in (file for path in map(Path, sys.path) if path.name == "site-packages" for file in path.iterdir()):
        is_wanted = "diffusers_dmp" not in installed.name and installed.suffix != ".pth"
        if is_wanted and not (folder / installed.name).exists():  # the first counts, as for an import
            (folder / installed.name).symlink_to(installed)
    return folder


def contents(folder: Path) -> "dict[Path, bytes | dict]":
    """The files of a folder; configurations without the place that they were loaded from."""
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {
        name: json.loads(content) | {"_name_or_path": None} if name.suffix == ".json" else content
        for name, content in files.items()
    }


def upload(api: HfApi, name: str, folder: Path) -> None:
    api.create_repo(f"user/{name}")
    api.upload_folder(repo_id=f"user/{name}", folder_path=folder)


@pytest.mark.parametrize("mode", ["package", "code"])
def test_every_pipeline_over_http(hub, tmp_path, site_packages, mode):
    api = HfApi(endpoint=hub.url, token="hf_writer")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"noise": noise, **SD3_CALL}, tmp_path / "inputs.safetensors")
    expected = {}
    for name, pipeline in make_all().items():
        pipeline.set_progress_bar_config(disable=True)
        expected[name] = pipeline([3, 5], latents=noise, num_inference_steps=4, output_type="latent").images
        pipeline.save_pretrained(tmp_path / "local" / name)
        pipeline.save_pretrained(tmp_path / "bundled" / name, bundle_code=True)
        upload(api, name, tmp_path / "bundled" / name)
        pipeline.denoisers[0].save_pretrained(tmp_path / "models" / name, bundle_code=True)
        upload(api, f"{name}-model", tmp_path / "models" / name)

    # a pipeline of Diffusers with experts, whose class knows nothing of code files
    stock = sd3_experts()
    expected["sd3"] = stock(**SD3_CALL, height=8, width=8, num_inference_steps=4, output_type="latent").images
    stock.save_pretrained(tmp_path / "stock")
    publish(tmp_path / "stock", "user/sd3", license="mit", endpoint=hub.url, token="hf_writer")

    output = tmp_path / "output"
    output.mkdir()
    environment = os.environ | hub.environment(tmp_path / "home", token="hf_writer")
    interpreter = [sys.executable]
    if mode == "code":
        environment["PYTHONPATH"] = str(site_packages)
        interpreter.append("-S")  # without what site-packages link to
    script = [Path(__file__).with_name("load_all.py"), mode, tmp_path / "inputs.safetensors", output, *PIPELINES]
    result = subprocess.run([*interpreter, *map(str, script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    samples = load_file(output / "samples.safetensors")
    for source in ("hub", "again", "pushed"):
        torch.testing.assert_close(samples[f"sd3.{source}"], expected["sd3"])
    assert [file for file in hub.repos["user/sd3"].files if file.endswith(".py")] == ["transformer/diffusers_dmp.py"]
    expected.pop("sd3")
    for name, images in expected.items():
        for source in ("hub", "again", "pushed"):
            torch.testing.assert_close(samples[f"{name}.{source}"], images)
        # without the package every folder holds code: nothing else could load it
        assert contents(output / name) == contents(tmp_path / ("local" if mode == "package" else "bundled") / name)
        pushed = hub.repos[f"user/{name}-pushed-{mode}"].files.keys() - {".gitattributes", "README.md"}
        assert pushed == {file.as_posix() for file in contents(tmp_path / "bundled" / name)}
        assert type(DiffusionPipeline.from_pretrained(output / name)).__module__ == "diffusers_dmp"


@pytest.mark.parametrize("name", PIPELINES)
def test_local_folders_hold_no_code(tmp_path, name):
    PIPELINES[name]().save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(DiffusionPipeline.from_pretrained(tmp_path)).__name__
    assert {value[0] for value in index.values() if isinstance(value, list)} <= {"diffusers", "diffusers_dmp", None}


@pytest.mark.parametrize("name", PIPELINES)
def test_folders_of_version_0_1(tmp_path, name):
    """They hold code files, none of which is executed with this package."""
    pipeline = PIPELINES[name]()
    pipeline.save_pretrained(tmp_path, bundle_code=True)
    index = tmp_path / "model_index.json"
    config = json.loads(index.read_text())
    assert config["_class_name"] == ["pipeline", type(pipeline).__name__]
    index.write_text(json.dumps(config | {VERSION_KEY: "0.1.0"}))
    code_files = list(tmp_path.rglob("*.py"))
    assert len(code_files) >= 2
    for file in code_files:
        file.write_text("raise AssertionError('executed')")
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is type(pipeline)
    assert type(DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)) is type(pipeline)
    assert type(type(pipeline).from_pretrained(tmp_path)) is type(pipeline)


def test_a_split_pipeline_as_it_was_saved_before_it_brought_code(tmp_path):
    """Its settings were lists."""
    PIPELINES["split"]().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    config = json.loads(index.read_text())
    lists = {name: list(config[name].values()) for name in ("snr_boundaries", "prediction_types", "guidance_scales")}
    index.write_text(json.dumps(config | lists))
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is SNRSplitPipeline
