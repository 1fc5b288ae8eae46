"""The presets for one's own images, and the commands that docs/training.md gives for them, run as a user runs them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import REPOSITORY
from diffusers import DiffusionPipeline

import diffusers_dmp  # noqa: F401, for the pipeline's components

FEW_STEPS = ["--max_train_steps", "3", "--report_to", "none"]
COMMAND = "from diffusers_dmp.cli import main; main()"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `path/to/images`: photos of 40 x 40 pixels in two classes."""
    folder, random = tmp_path_factory.mktemp("here"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "path/to/images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "path/to/images" / name / f"{i}.png")
    return folder


def on_a_cpu(preset: str) -> list[str]:
    """The options that the preset's first lines give for a CPU, and few steps."""
    lines = (REPOSITORY / "training" / "presets" / f"{preset}.yaml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    return [*shlex.split(comment.partition("To try it on a CPU: ")[2]), *FEW_STEPS, "--lr_warmup_steps", "1"]


def run(here: Path, arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr


def documented(here: Path, *options: str) -> None:
    """Run the one command of `On your own images` that has these options, with few steps."""
    section = (
        (REPOSITORY / "docs" / "training.md").read_text().partition("## On your own images")[2].partition("## Data")[0]
    )
    commands = "\n".join(re.findall(r"```sh\n(.+?)```", section, re.DOTALL)).replace("\\\n", " ").splitlines()
    (command,) = [each for each in commands if set(options) <= set(each.split())]
    _, *arguments = shlex.split(command)
    if "sample" in options:
        return run(here, [*arguments, "--num_inference_steps", "2"])
    preset = next((each for each in arguments if re.fullmatch(r"\w+_rgb\d+", each)), None)
    # a batch of the few images there are, where no preset has one
    run(here, [*arguments, *(on_a_cpu(preset) if preset else [*FEW_STEPS, "--batch_size", "8"])])


@pytest.mark.slow
def test_the_documented_commands(here):
    documented(here, "train", "dtr", "dtr_rgb32")
    documented(here, "sample", "outputs/mine")
    assert PIL.Image.open(here / "cats.png").size == (34, 133)  # one column of four
    documented(here, "train", "dit", "dit_rgb32")
    documented(here, "train", "remix")
    documented(here, "train", "dmp")
    for name in ("mine_remix", "mine_dmp"):
        pipe = DiffusionPipeline.from_pretrained(here / "outputs" / name / "pipeline")
        assert pipe(["dog"], num_inference_steps=2).images[0].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["dit", "dtr"])
def test_the_presets_for_64_pixels(here, system):
    preset, folder = f"{system}_rgb64", f"outputs/{system}_rgb64"
    run(
        here,
        [
            "train",
            system,
            "--config",
            preset,
            "--dataset",
            "path/to/images",
            "--output_dir",
            folder,
            *on_a_cpu(preset),
        ],
    )
    pipe = DiffusionPipeline.from_pretrained(here / folder / "pipeline")
    assert pipe(["dog"], num_inference_steps=2).images[0].size == (64, 64)
