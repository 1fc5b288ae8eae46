"""The reports of `make demo-guidance`, on an untrained model, experts that are not trained either, and pictures of noise."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY
from tiny_sentences import sentence_pipe, transformer

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.evaluation import judge


@pytest.fixture(scope="module")
def demo():
    """The script, with few samples and steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "examples"))
        import clothes_judge
        import guidance_demo

        few = {
            "HALF": 30,
            "GUIDE_STEPS": 2,
            "SAMPLES_PER_CLASS": 1,
            "SEARCHED_PER_CLASS": 1,
            "SHOWN_PER_CLASS": 1,
            "SCALES": (7.5,),
            "NUM_INFERENCE_STEPS": 4,
            "SAMPLE_BATCH": 10,
            "MEASURED_SIGMAS": (0.1, 0.9),
        }
        for name, value in few.items():
            patch.setattr(guidance_demo, name, value)
        for module in (guidance_demo, clothes_judge):
            patch.setattr(module, "fashion_images", lambda split="train": _pictures())
            patch.setattr(module, "REAL", 30)
        patch.setattr(judge, "NUM_STEPS", 2)
        yield guidance_demo


def _pictures() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).integers(256, size=(60, 28, 28), dtype=np.uint8)
    return images, np.arange(60) % 10


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """What the trainings leave: a pipeline, both classifiers, and experts of both kinds of noise."""
    folder = tmp_path_factory.mktemp("guidance_demo")
    pipeline = sentence_pipe(transformer(sample_size=28, pos_embed_max_size=7))
    pipeline.save_pretrained(folder / "pipeline")
    demo.PIPELINE = folder / "pipeline"
    demo.fit_classifiers(folder)
    for name, noise in (("flow", {"process": "flow_matching"}), ("ddpm", {"beta_schedule": "linear"})):
        experts = GuidanceExperts.from_base(str(folder / "guide"), num_experts=5, rank=2, noise_schedule=noise)
        experts.save_pretrained(folder / name / "experts")
        (folder / name / "training_summary.json").write_text('{"steps": 1, "train_seconds": 2.0}')
    return folder


def test_the_judge_is_saved_and_of_another_kind(demo, folder):
    report = json.loads((folder / "classifiers.json").read_text())
    assert report["test_pictures"] == 60 and 0 <= report["guide_accuracy"] <= 1 and 0 <= report["judge_accuracy"] <= 1
    judge = demo.load_judge(folder / demo.JUDGE)
    assert not [each for each in judge.modules() if isinstance(each, torch.nn.BatchNorm2d)] and not judge.training
    # it has learned from the second half alone
    images, labels = _pictures()
    again = demo.fit_judge(folder / "again.safetensors", images[30:], labels[30:])
    assert all(torch.equal(*pair) for pair in zip(judge.parameters(), again.parameters(), strict=True))


def test_the_comparison(demo, folder, capsys):
    demo.search(folder)
    assert list(json.loads((folder / "scales.json").read_text())["recognised"]) == list(demo.GUIDES[:-1])
    demo.compare(folder)
    report = json.loads((folder / "guidance.json").read_text())
    assert set(report["drawn"]) == {"Euler", "UniPC"} and "unguided" in report["drawn"]["Euler"]
    for figures in [*report["drawn"]["Euler"].values(), report["real pictures"]]:
        low, high = figures["interval"]
        assert 0 <= low <= figures["recognised"] <= high <= 1 and figures["spread"] > 0
    # untrained experts are the classifier itself, and those of the same noise guide as it does
    euler = {cell.guide: demo.draw(folder / "samples", None, cell, {}, 1) for cell in demo.COMPARED[:6]}
    assert (euler[demo.CLEAN]["images"] == euler[demo.FLOW]["images"]).mean() > 0.99
    assert (euler[demo.UNMATCHED]["images"] == euler[demo.FLOW]["images"]).mean() > 0.99
    different = (demo.UNGUIDED, demo.CLEAN_X0, demo.DDPM)
    assert all((euler[name]["images"] != euler[demo.FLOW]["images"]).any() for name in different)
    assert report["accuracy_by_sigma"][demo.CLEAN] == report["accuracy_by_sigma"][demo.FLOW]
    assert PIL.Image.open(folder / "guidance_fashion.png").size[0] > 500
    assert (folder / "guidance.md").read_text() in capsys.readouterr().out


def test_pictures_are_drawn_once(demo, folder):
    cell = demo.Cell("Euler", demo.CLEAN, 0.0)
    drawn = demo.draw(folder / "again", demo.load_pipeline(), cell, demo.load_guides(folder), 1)
    read = demo.draw(folder / "again", None, cell, {}, 1)
    assert (drawn["images"] == read["images"]).all() and (read["labels"] == np.arange(10)).all()
    # a scale of 0 changes nothing
    unguided = demo.draw(folder / "again", demo.load_pipeline(), demo.Cell("Euler", demo.UNGUIDED), {}, 1)
    assert (unguided["images"] == drawn["images"]).all()


def test_the_model_of_the_other_demo_is_needed(demo, folder, monkeypatch):
    monkeypatch.setattr(demo, "PIPELINE", folder / "nowhere")
    with pytest.raises(ValueError, match=r"`make demo-text` to have left its model in '.*nowhere', but there is no"):
        demo.search(folder)


def test_which_noise_an_expert_owns(demo, folder):
    guides = demo.load_guides(folder)
    assert demo.edges_as_sigma(guides[demo.FLOW]) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    betas = np.linspace(1e-4, 0.02, 1000)
    product = np.cumprod(1 - betas)[[0, 200, 400, 600, 800]]
    sigmas = np.sqrt(1 - product) / (np.sqrt(product) + np.sqrt(1 - product))
    assert demo.edges_as_sigma(guides[demo.DDPM])[:-1] == pytest.approx(sigmas, abs=1e-3)
    # of the 4 steps, from σ = 1 to 0.001, the first one is not guided
    assert demo.guided_steps(guides[demo.FLOW]) == [1, 1, 0, 1, 0]


def test_the_interval_of_a_share(demo):
    from clothes_judge import wilson_interval

    assert wilson_interval(50, 100) == [0.4038, 0.5962]
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1
