"""`pipelines/<system>/example.py`: the examples run on what the demos save, here untrained."""

import runpy
import sys

import pytest
from conftest import REPOSITORY, randomised
from diffusers import DDIMScheduler
from networks import make_resnet
from PIL import Image
from small_pipelines import DIT, PIPELINES, UNET, with_one

from diffusers_dmp import DiTModel, GuidanceExperts, PatchedUNet2DModel, SNRSplitPipeline
from diffusers_dmp.hub.folders import read_folder

SYSTEMS = ["dtr", "remix", "dmp", "patch_diffusion", "ppap"]  # those of "experts" save what they load themselves


def split() -> SNRSplitPipeline:
    denoisers = [randomised(PatchedUNet2DModel(**UNET)) for _ in range(2)]
    return SNRSplitPipeline(denoisers, DDIMScheduler(), snr_boundaries=[0.25])


FOLDERS = {  # the folders that the examples load
    "dtr": ("demo", PIPELINES["dtr"]),
    "remix": ("remix_digits", PIPELINES["remix"]),
    "dmp": ("dmp_digits", PIPELINES["dmp"]),
    "patch_diffusion": ("patch_digits", split),
    "ppap": (
        "dit_digits_unconditional",
        lambda: with_one(DiTModel(**DIT | {"num_classes": 1, "class_dropout_prob": 0.0})),
    ),
}


def test_the_example_of_noise_experts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py", "--boundary", "0.9", "--num_inference_steps", "4"])
    runpy.run_path(str(REPOSITORY / "pipelines" / "experts" / "example.py"))
    assert len(Image.open("experts_samples.png").convert("L").getcolors()) > 2
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == (
        "At timestep 1000 expert 1 of 2 denoises, a SD3Transformer2DModel; it owns the timesteps from 900 on."
    )
    assert "expert 0 of 2" in last and last.endswith("below 900.")
    owned = read_folder("outputs/experts").intervals()
    assert owned == (
        "expert 0, a SD3Transformer2DModel, owns the timesteps below 900; expert 1, a SD3Transformer2DModel, owns the "
        "timesteps from 900 on"
    )
    assert read_folder("outputs/experts/transformer").intervals() == owned


@pytest.mark.parametrize("system", SYSTEMS)
def test_examples(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, make = FOLDERS[system]
    make().save_pretrained(f"outputs/{folder}/pipeline")
    if system == "ppap":
        make_resnet(num_channels=1).save_pretrained("outputs/digits_classifier")
        settings = {"image_mean": [0.5], "image_std": [0.5], "image_size": 32}
        experts = GuidanceExperts.from_base("outputs/digits_classifier", **settings)
        experts.save_pretrained("outputs/ppap_digits/experts")
    monkeypatch.setattr(sys, "argv", ["example.py"])
    runpy.run_path(str(REPOSITORY / "pipelines" / system / "example.py"))
    for picture in tmp_path.glob("*.png"):
        assert len(Image.open(picture).convert("L").getcolors()) > 2
    assert (tmp_path / f"{system.removesuffix('_diffusion')}_samples.png").exists()
