"""What the README says runs, runs."""

import importlib
import json
import re

import PIL.Image
import pytest
from conftest import REPOSITORY, TINY_CONFIG, randomised

from diffusers_dmp import ClassConditionalPipeline, DTRTransformer2DModel, PromptPatch
from diffusers_dmp.terminal import run_command
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.objectives.from_arguments import make_scheduler


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


def test_the_ten_lines_run(demo_folder):
    (code,) = re.findall(r"```python\n(.+?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert (demo_folder / "three.png").exists()


def test_the_demos_report(demo_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import digits_demo as demo

    (demo_folder / "outputs" / "demo" / "training_summary.json").write_text('{"steps": 1, "train_seconds": 2.0}')
    monkeypatch.setattr(demo, "SAMPLES_PER_CLASS", 2)
    folder = demo_folder / "outputs" / "demo"
    demo.report(folder)
    report = json.loads((folder / "report.json").read_text())
    assert report["samples"] == 20 and report["steps"] == 1 and report["parameters"] > 0
    assert 0 <= report["recognised"] <= 1
    # ten columns and two rows of 8 x 8 pixels, six times enlarged, with gaps of one pixel
    assert PIL.Image.open(folder / "samples.png").size == (6 * (10 * 9 + 1), 6 * (2 * 9 + 1))
    assert PIL.Image.open(folder / "routing.png").size[0] > 500


def test_the_report_of_prompts(demo_folder, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import digits_demo as demo

    folder = demo_folder / "outputs" / "demo"
    pipeline = ClassConditionalPipeline.from_pretrained(folder / "pipeline")
    PromptPatch.for_transformer(pipeline.transformer).attach(pipeline.transformer)
    pipeline.save_pretrained(folder / "pipeline")
    losses = {"before": {"validation_loss": 0.5}, "after": {"validation_loss": 0.25}}
    (folder / "training_summary.json").write_text(json.dumps({"steps": 1, "train_seconds": 2.0} | losses))
    monkeypatch.setattr(demo, "SAMPLES_PER_CLASS", 1)
    demo.report(folder)
    assert json.loads((folder / "report.json").read_text())["validation_loss"] == {"before": 0.5, "after": 0.25}
    for picture in ("gates.png", "prompt_usage.png"):
        assert PIL.Image.open(folder / picture).size[0] > 300


def test_the_demo_of_clothes_reports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import fashion_demo as demo

    size = {"in_channels": 1, "out_channels": 2, "sample_size": 28, "patch_size": 7, "num_classes": 10}
    model = randomised(DTRTransformer2DModel(**TINY_CONFIG | size))
    scheduler = make_scheduler(TrainingArguments(), in_latents=False)
    ClassConditionalPipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "training_summary.json").write_text('{"steps": 1, "train_seconds": 2.0}')
    monkeypatch.setattr(demo, "SAMPLES_PER_CLASS", 2)
    monkeypatch.setattr(demo, "SETTINGS", {"guidance_scale": 1.5, "num_inference_steps": 2})
    demo.report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 20 and report["steps"] == 1 and 0 <= report["recognised"] <= 1
    # ten columns and two rows of 28 x 28 pixels, four times enlarged, with gaps of one pixel
    assert PIL.Image.open(tmp_path / "samples.png").size == (4 * (10 * 29 + 1), 4 * (2 * 29 + 1))
    assert PIL.Image.open(tmp_path / "routing.png").size[0] > 500


@pytest.mark.parametrize(
    ("demo", "part"), [("fashion_demo", "report"), ("digits_demo", "report"), ("digits_demo", "guidance")]
)
def test_the_demos_refuse_a_folder_without_a_training(tmp_path, monkeypatch, capsys, demo, part):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    with pytest.raises(SystemExit) as stopped:
        run_command(importlib.import_module(demo).main, [part, str(tmp_path / "nowhere")], name=demo)
    assert stopped.value.code == 2
    summary = str(tmp_path / "nowhere" / "training_summary.json")
    assert capsys.readouterr().err == f"{demo}: Expected {summary!r} to be JSON, but there is no such file.\n"


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/training.md",
        "docs/text_to_image.md",
        "docs/weights.md",
        "docs/prompts.md",
        "docs/routing.md",
        "docs/snr_split.md",
        "docs/speed.md",
        "docs/guidance.md",
        "docs/guidance_targets.md",
        "docs/guidance_training.md",
        "docs/demo_guidance.md",
        "docs/hub.md",
        "docs/evaluation.md",
    ],
)
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
    for command in re.findall(r"(?<![\w/])(?:training|training/presets)/\w+\.(?:py|yaml)", path.read_text()):
        assert (REPOSITORY / command).exists(), command
