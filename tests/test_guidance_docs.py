"""What docs/guidance.md says runs, runs: with tiny networks and pipelines of the same classes in the place of the published ones."""

import re
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import DDPMScheduler, DiffusionPipeline
from networks import make_resnet
from tiny_clip import save_clip
from tiny_pipelines import RECIPES
from tiny_text import with_text
from torch import nn

from diffusers_dmp import ClassConditionalPipeline, DiTModel, GuidanceExperts, GuidedScheduler, TextTarget

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
    model = randomised(DiTModel(**TINY_CONFIG | {"in_channels": 3, "out_channels": 3, "num_classes": 1, "class_dropout_prob": 0.0}))
    return ClassConditionalPipeline(model, DDPMScheduler())


def called_small(pipeline_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a pipeline generate small images in two steps, whatever it is asked for."""
    call = pipeline_class.__call__
    settings = SMALL | CALLS.get(pipeline_class.__name__, {})
    monkeypatch.setattr(
        pipeline_class, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs | settings)
    )


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Tiny things where the page names published ones."""
    network = make_resnet(num_labels=4, id2label=dict(enumerate(CLASSES)))
    network.save_pretrained(tmp_path / "resnet-50")
    settings = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": false}'
    (tmp_path / "resnet-50" / "preprocessor_config.json").write_text(settings)
    save_clip(tmp_path / "clip-vit-large-patch14")
    experts = GuidanceExperts.from_base(str(tmp_path / "resnet-50"), noise_schedule={"beta_schedule": "linear"})
    experts.save_pretrained(tmp_path / "experts")
    for owner, method in (
        (GuidanceExperts, "from_base"),
        (TextTarget, "from_pretrained"),
        (GuidanceExperts, "from_pretrained"),
    ):
        original = getattr(owner, method)
        monkeypatch.setattr(owner, method, lambda name, *args, _load=original, **kwargs: _load(
            str(tmp_path / Path(name).name), *args, **kwargs
        ))  # fmt: skip
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(tiny_pipeline))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_: self)
    for name in ("sd3", "flux", "wan"):
        called_small(type(RECIPES[name].pipe(RECIPES[name].denoiser())), monkeypatch)
    called_small(ClassConditionalPipeline, monkeypatch)


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
    assert made["decode"](vae, torch.zeros(1, 4, 8, 8)).shape == (1, 3, 8, 8)


def test_other_networks(published, monkeypatch):
    class Midas(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 1, 3, padding=1)

        def forward(self, images):
            return self.convolution(images)[:, 0]

    monkeypatch.setattr(torch.hub, "load", lambda repository, name: Midas())
    made = {}
    exec(compile(snippets("guidance.md", "torch.hub.load"), "guidance.md", "exec"), made)
    assert made["experts"](torch.zeros(1, 3, 8, 8), torch.tensor(0)).predicted_depth.shape == (1, 256, 256)
    exec(compile(snippets("guidance_training.md", "GuidanceExperts.from_base"), "guidance_training.md", "exec"), made)
    assert made["experts"].config.num_experts == 5


def test_a_target_of_ones_own(published):
    made = {}
    exec(compile(snippets("guidance.md", "class BrightTarget"), "guidance.md", "exec"), made)
    vision = GuidanceExperts.from_base("resnet-50", num_experts=1)
    output = vision(torch.zeros(2, 3, 16, 16), torch.tensor(0))
    assert made["BrightTarget"]().log_likelihood(output).shape == (2,)
