"""The wheel, built through the source distribution and installed without a checkout: what pip installs is complete."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from small_pipelines import PIPELINES

from diffusers_dmp.evaluation.digits import write_image_folder

CHECK = """
import importlib.metadata, importlib.resources, pathlib, sys
import diffusers_dmp
from diffusers import DiffusionPipeline
from diffusers_dmp.hub import publish

package = pathlib.Path(diffusers_dmp.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert importlib.metadata.version("diffusers-dmp") == diffusers_dmp.__version__
assert (package / "py.typed").is_file()
pipe = DiffusionPipeline.from_pretrained("saved", local_files_only=True)
assert type(pipe).__module__ == "diffusers_dmp"
assert pipe([3], num_inference_steps=2).images[0].size == (8, 8)
publication = publish("saved", "user/wheel", license="mit", dry_run=True)
assert "pipeline.py" in publication.files and "# wheel" in publication.card
"""


def run(*command, **options) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_wheel_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    source = tmp_path / "source"
    files = run(
        "git",
        "-C",
        REPOSITORY,
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "src",
        "pipelines",
        "training",
    ).split("\0")
    for name in filter(None, files):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # without isolation, which would download setuptools
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("diffusers_dmp-*.whl")

    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    others = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    (site_packages / "others.pth").write_text(
        "\n".join(map(str, others))
    )  # not their .pth files: no editable installation
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-deps", "--ignore-installed", wheel)

    PIPELINES["dit"]().save_pretrained(tmp_path / "saved")
    run(environment / "bin" / "python", "-c", CHECK, cwd=tmp_path)
    command = environment / "bin" / "diffusers-dmp"
    assert "publish" in run(command, "--help", cwd=tmp_path)
    train_and_export(command, tmp_path)


def train_and_export(command: Path, folder: Path) -> None:
    """As who has the wheel alone does it: a preset by its name, and a pipeline of a checkpoint."""
    write_image_folder(folder / "digits", range(0, 300, 9))
    tiny = {"max_train_steps": 2, "checkpointing_steps": 1, "batch_size": 8, "num_layers": 1, "report_to": "none"}
    options = [part for name, value in tiny.items() for part in (f"--{name}", value)]
    run(command, "train", "dtr", "--config", "dtr_digits", "--dataset", "digits", "--output_dir", "run",
        "--sample_steps", 0, *options, cwd=folder)  # fmt: skip
    run(command, "export", "run/checkpoint-2", "exported", cwd=folder)
    assert "system: dtr" in run(command, "info", "exported", cwd=folder)
