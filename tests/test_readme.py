"""What the README says runs, runs."""

import re

import pytest
from conftest import REPOSITORY, TINY_CONFIG, randomised

from diffusers_dmp import ClassConditionalPipeline, DTRTransformer2DModel
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.trainer import make_scheduler


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """A pipeline where `make demo` leaves its own, untrained."""
    model = randomised(DTRTransformer2DModel(**TINY_CONFIG | {"in_channels": 1, "out_channels": 2}))
    scheduler = make_scheduler(TrainingArguments(), in_latents=False)
    id2label = {str(digit): str(digit) for digit in range(10)}
    pipeline = ClassConditionalPipeline(model, scheduler, id2label=id2label)
    pipeline.save_pretrained(tmp_path / "outputs" / "demo" / "pipeline")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_eight_lines_run(demo_folder):
    (code,) = re.findall(r"```python\n(.+?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert (demo_folder / "three.png").exists()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/training.md", "docs/weights.md"])
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
    for command in re.findall(r"(?<![\w/])(?:training|training/presets)/\w+\.(?:py|yaml)", path.read_text()):
        assert (REPOSITORY / command).exists(), command
