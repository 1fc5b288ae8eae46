"""`pipelines/<system>/`: the examples run on the outputs of the demos, here untrained; the pipelines load stock models."""

import json
import runpy
import sys

import pytest
from conftest import REPOSITORY, randomised
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from networks import make_resnet
from PIL import Image
from small_pipelines import DIT, PIPELINES, UNET, with_one

from diffusers_dmp import ClassConditionalPipeline, DiTModel, GuidanceExperts, PatchedUNet2DModel, SNRSplitPipeline

SYSTEMS = ["dtr", "remix", "dmp", "patch_diffusion", "ppap"]


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


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A repository with the DiT of Diffusers."""
    folder = tmp_path_factory.mktemp("stock")
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    transformer = randomised(DiTTransformer2DModel(**config, num_embeds_ada_norm=1000))
    vae = AutoencoderKL(block_out_channels=[32], norm_num_groups=8, latent_channels=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())  # like facebook/DiT-XL-2-256
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"207": "golden retriever"}}))
    return folder


@pytest.mark.parametrize("system", ["dtr", "remix", "dmp", "ppap"])
def test_as_custom_pipeline(stock, system):
    custom = {"custom_pipeline": str(REPOSITORY / "pipelines" / system), "trust_remote_code": True}
    pipe = DiffusionPipeline.from_pretrained(stock, **custom)
    assert type(pipe) is ClassConditionalPipeline
    assert pipe("golden retriever", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 8)


def test_the_split_pipeline_as_custom_pipeline(tmp_path):
    split().save_pretrained(tmp_path)
    custom = {"custom_pipeline": str(REPOSITORY / "pipelines" / "patch_diffusion"), "trust_remote_code": True}
    assert type(DiffusionPipeline.from_pretrained(tmp_path, **custom)) is SNRSplitPipeline
