"""What the pages about guidance say runs, runs: with tiny networks and pipelines of the same classes in the place of the published ones."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import DDPMScheduler, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, WanPipeline
from networks import make_resnet
from tiny_clip import save_clip
from tiny_pipelines import RECIPES, seeded
from tiny_text import with_text
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DiTModel,
    GuidanceExperts,
    GuidedScheduler,
    LatentDecoder,
    TextTarget,
)

CLASSES = ["7", "great white shark", "killer whale", "zebra"]
SMALL = {"num_inference_steps": 2, "height": 16, "width": 16}
CALLS = {"WanPipeline": {"num_frames": 9}, "ClassConditionalPipeline": {"height": 8, "width": 8}}


def snippets(page: str, *parts: str) -> str:
    """The Python of a page that has these lines, one after the other."""
    code = re.findall(r"```python\n(.+?)```", (REPOSITORY / "docs" / page).read_text(), re.DOTALL)
    return "\n".join(next(each for each in code if part in each) for part in parts)


def tiny_pipeline(pipeline_class: type, name: str, **_) -> DiffusionPipeline:
    """A pipeline of the class that the page loads."""
    names = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux", "WanPipeline": "wan"}
    if pipeline_class.__name__ in names:
        recipe = RECIPES[names[pipeline_class.__name__]]
        return with_text(names[pipeline_class.__name__], recipe.pipe(recipe.denoiser()))
    model = randomised(
        DiTModel(**TINY_CONFIG | {"in_channels": 3, "out_channels": 3, "num_classes": 1, "class_dropout_prob": 0.0})
    )
    return ClassConditionalPipeline(model, DDPMScheduler())


def called_small(pipeline_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pipeline generate small images in two steps, whatever it is asked for."""
    call = pipeline_class.__call__
    settings = SMALL | CALLS.get(pipeline_class.__name__, {})
    monkeypatch.setattr(
        pipeline_class, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs | settings)
    )


def load_tiny(folder: Path, load: Callable, name: str, *args, **kwargs):
    """Load what has the same name, and where a tokenizer is named that one, from a folder."""
    if "tokenizer" in kwargs:
        kwargs["tokenizer"] = folder / Path(kwargs["tokenizer"]).name
    return load(str(folder / Path(name).name), *args, **kwargs)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with tiny networks that have the names of published ones, and experts."""
    folder = tmp_path_factory.mktemp("tiny")
    make_resnet(num_labels=4, id2label=dict(enumerate(CLASSES))).save_pretrained(folder / "resnet-50")
    settings = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": false}'
    (folder / "resnet-50" / "preprocessor_config.json").write_text(settings)
    for name in ("clip-vit-large-patch14", "clip-vit-base-patch32", "PickScore_v1", "CLIP-ViT-H-14-laion2B-s32B-b79K"):
        save_clip(folder / name)
    experts = GuidanceExperts.from_base(str(folder / "resnet-50"), noise_schedule={"beta_schedule": "linear"})
    experts.save_pretrained(folder / "experts")
    return folder


@pytest.fixture
def published(tiny, monkeypatch):
    """Load tiny things where the page names published ones, onto no device, and generate small images."""
    for owner, name in (
        (GuidanceExperts, "from_base"),
        (GuidanceExperts, "from_pretrained"),
        (TextTarget, "from_pretrained"),
    ):
        monkeypatch.setattr(owner, name, partial(load_tiny, tiny, getattr(owner, name)))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(tiny_pipeline))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_: self)
    for pipeline_class in (StableDiffusion3Pipeline, FluxPipeline, WanPipeline, ClassConditionalPipeline):
        called_small(pipeline_class, monkeypatch)


@pytest.mark.parametrize(
    "lines",
    [
        ("import StableDiffusion3Pipeline", "TextTarget.from_pretrained"),
        ("import FluxPipeline",),
        ("import WanPipeline",),
        ("outputs/dit_digits_unconditional/pipeline",),
    ],
)
def test_recipes(published, lines):
    code = snippets("guidance.md", *lines)
    made = {}
    exec(compile(code, "guidance.md", "exec"), made)
    assert {"image", "images", "video"} & made.keys()
    assert isinstance(made["pipe"].scheduler, GuidedScheduler)


def test_a_pipeline_is_taught(monkeypatch):
    monkeypatch.setattr("diffusers_dmp.guidance.pipeline_decoders._DECODERS", {})
    made = {"MyPipeline": type("MyPipeline", (DiffusionPipeline,), {})}
    exec(compile(snippets("guidance.md", "register_decoder"), "guidance.md", "exec"), made)
    vae = RECIPES["sd15"].pipe(RECIPES["sd15"].denoiser()).vae
    latents = torch.zeros(1, 4, 8, 8)
    assert made["decode"](vae, latents).shape == LatentDecoder(vae, made["decode"])(latents).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("lines", [("a photo of a zebra",), ("class MeanColour",)])
def test_targets(published, lines):
    made = {"pipe": tiny_pipeline(StableDiffusion3Pipeline, "sd3")}
    exec(compile(snippets("guidance_targets.md", *lines), "guidance_targets.md", "exec"), made)
    unguided = made["pipe"].scheduler.scheduler
    guided = made["pipe"]("a horse", generator=seeded(), output_type="pt").images
    made["pipe"].scheduler = unguided
    assert not torch.equal(guided, made["pipe"]("a horse", generator=seeded(), output_type="pt").images)


def test_scores(published, monkeypatch):
    """PickScore is a CLIP without a tokenizer; the aesthetic predictor is a head on CLIP's embeddings of 768 numbers."""
    code = snippets("guidance_targets.md", "PickScore_v1")
    made = {}
    exec(compile(code, "guidance_targets.md", "exec"), made)
    assert made["target"].text_embeds.shape == (1, 8)

    code = snippets("guidance_targets.md", "linearMSE")
    head = code[code.index("head = ") : code.index("weights = ")]
    exec("from torch import nn\n" + head, layers := {})
    weights = {f"layers.{name}": tensor for name, tensor in layers["head"].state_dict().items()}
    monkeypatch.setattr(torch, "load", lambda *_, **__: weights)
    exec(compile(code, "guidance_targets.md", "exec"), made)
    assert made["target"].head(torch.zeros(2, 768)).shape == (2, 1)


def test_other_networks(published, monkeypatch):
    """Of torchvision, which need not be installed."""

    class ResNet(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, stride=8), nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 4)

        def forward(self, images):
            return self.fc(self.conv2(self.conv1(images)).mean((2, 3)))

    weights = SimpleNamespace(DEFAULT=SimpleNamespace(meta={"categories": CLASSES}))
    models = SimpleNamespace(resnet50=lambda weights: ResNet(weights), ResNet50_Weights=weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    made = {}
    exec(compile(snippets("guidance_targets.md", "import torchvision"), "guidance_targets.md", "exec"), made)
    target = ClassTarget("zebra")
    target.prepare(made["experts"].network_config)
    assert target.log_likelihood(made["experts"](torch.zeros(2, 3, 64, 64), torch.tensor(0))).shape == (2,)


def test_experts_and_a_target_of_ones_own(published):
    made = {}
    code = snippets("guidance_training.md", "GuidanceExperts.from_base") + snippets(
        "guidance_targets.md", "FirstClass"
    )
    exec(compile(code, "guidance_training.md", "exec"), made)
    assert made["experts"].config.num_experts == 5
    output = made["experts"](torch.zeros(2, 3, 16, 16), torch.tensor(0))
    assert made["FirstClassTarget"]().log_likelihood(output).shape == (2,)
