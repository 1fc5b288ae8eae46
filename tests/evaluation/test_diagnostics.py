"""The diagnosis of experts whose losses are known by construction."""

import json

import pytest
import torch
from conftest import randomised
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import RECIPES
from typer.testing import CliRunner

from diffusers_dmp import (
    ClassConditionalPipeline,
    DiTModel,
    LoraExperts,
    NoiseIntervals,
    RemixDiTModel,
    SNRSplitPipeline,
)
from diffusers_dmp.cli import app
from diffusers_dmp.evaluation.diagnostics import band_losses, diagnose, reading_of_training
from diffusers_dmp.evaluation.digits import write_image_folder
from diffusers_dmp.plots import diagnosis_figure
from diffusers_dmp.training.data.images import load_images

DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "in_channels": 1}
UNET = {"block_out_channels": (32,), "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
BOUNDARY = 500


class KnowsGrey(UNet2DModel):
    """Predicts the noise of grey images, x0 = 0, exactly at its known timesteps, as x_t/σ_t, and zero at all others."""

    def forward(self, sample, timestep, return_dict=True):
        sigma = (1 - DDIMScheduler().alphas_cumprod[timestep]).sqrt().view(-1, 1, 1, 1)
        knows = torch.tensor([int(t) in self.known for t in timestep]).view(-1, 1, 1, 1)
        return UNet2DOutput(sample=knows * sample / sigma)


@pytest.fixture
def grey(tmp_path):
    (tmp_path / "grey").mkdir()
    for index in range(16):
        Image.new("L", (8, 8), 127 + index % 2).save(tmp_path / "grey" / f"{index}.png")
    return load_images(str(tmp_path / "grey"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    return str(write_image_folder(tmp_path_factory.mktemp("digits"), range(40)))


def split_pipeline() -> SNRSplitPipeline:
    scheduler = DDIMScheduler()
    denoisers = [KnowsGrey(8, in_channels=1, out_channels=1, **UNET).eval() for _ in range(2)]
    denoisers[0].known, denoisers[1].known = range(BOUNDARY), range(BOUNDARY, 1000)
    share = float(scheduler.alphas_cumprod[BOUNDARY - 1 : BOUNDARY + 1].mean())  # between two timesteps
    return SNRSplitPipeline(denoisers, scheduler, snr_boundaries=[share / (1 - share)])


def test_losses_of_known_experts(grey):
    summary = {"experts": [{"samples_per_expert": [30, 0]}, {"samples_per_expert": [0, 10]}]}
    diagnosis = diagnose(split_pipeline(), grey, num_bands=4, num_inference_steps=20, training_summary=summary)
    assert diagnosis.edges == [0, BOUNDARY, 1000] and diagnosis.bands == [0, 250, 500, 750, 1000]
    # the error of predicting zero is the noise itself, whose mean square is 1
    losses, swaps = torch.tensor(diagnosis.band_losses), torch.tensor(diagnosis.swap_losses)
    torch.testing.assert_close(losses, torch.tensor([[0.0, 0, 1, 1], [1, 1, 0, 0]]), atol=0.1, rtol=0)
    torch.testing.assert_close(swaps, torch.tensor([[0.0, 1], [1, 0]]), atol=0.1, rtol=0)
    assert sum(diagnosis.sampling_steps) == 20 and diagnosis.sampling_steps == [10, 10]
    assert diagnosis.training_samples == [30, 10]


@pytest.mark.parametrize("num_bands", [4, 3])  # three: the middle one is of both experts
def test_the_loss_of_a_pipeline_is_that_of_the_expert_that_owns_the_noise(grey, num_bands):
    pipeline = split_pipeline()
    # x0 is 0 up to half a grey value, which counts where there is next to no noise
    assert all(loss < 0.1 for loss in band_losses(pipeline, grey, num_bands=num_bands))
    for denoiser in pipeline.denoisers:
        denoiser.known = range(0)
    torch.testing.assert_close(
        torch.tensor(band_losses(pipeline, grey, num_bands=num_bands)), torch.ones(num_bands), atol=0.1, rtol=0
    )


def test_swapping_experts_of_a_remix_dit(digits):
    """With one mixture for all experts, all have one loss."""
    model = randomised(RemixDiTModel(**DIT, num_classes=10, num_bases=2, num_experts=3))
    pipeline = ClassConditionalPipeline(model, DDIMScheduler())
    torch.nn.init.zeros_(model.mixing_logits)
    swaps = torch.tensor(diagnose(pipeline, load_images(digits), num_images=8).swap_losses)
    torch.testing.assert_close(swaps, swaps[:, :1].expand(3, 3))
    torch.nn.init.normal_(model.mixing_logits, std=3)
    swaps = torch.tensor(diagnose(pipeline, load_images(digits), num_images=8).swap_losses)
    assert (swaps - swaps[:, :1]).abs().max() > 1e-4


def test_a_model_without_experts(digits):
    pipeline = ClassConditionalPipeline(randomised(DiTModel(**DIT, num_classes=10)), DDIMScheduler())
    diagnosis = diagnose(pipeline, load_images(digits), num_images=8, num_bands=3)
    assert len(diagnosis.band_losses) == 1 and len(diagnosis.band_losses[0]) == 3
    assert diagnosis.sampling_steps == [50] and diagnosis.training_samples is None


def test_labels_are_needed_for_classes(grey):
    pipeline = ClassConditionalPipeline(randomised(DiTModel(**DIT, num_classes=10)), DDIMScheduler())
    with pytest.raises(
        ValueError, match="labels in the column 'label' for a model of 10 classes, but got the columns \\['image'"
    ):
        diagnose(pipeline, grey)


def test_figure(grey, tmp_path):
    diagnosis = diagnose(split_pipeline(), grey, num_bands=4)
    figure = diagnosis_figure(diagnosis)
    figure.savefig(tmp_path / "diagnosis.png")
    swaps = [text.get_text() for text in figure.axes[1].texts]
    assert len(swaps) == 4 and swaps[0] == swaps[3] == "1.00"


def test_at_the_command_line(digits, tmp_path):
    model = randomised(RemixDiTModel(**DIT, num_classes=10, num_bases=2, num_experts=3))
    ClassConditionalPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "output" / "pipeline")
    (tmp_path / "output" / "training_summary.json").write_text('{"samples_per_expert": [5, 6, 7]}')
    asked = [
        "diagnose",
        tmp_path / "output",
        "--dataset",
        digits,
        "--output_dir",
        tmp_path / "found",
        "--num_images",
        8,
    ]
    result = CliRunner().invoke(app, [str(each) for each in asked], catch_exceptions=False)
    assert "interval of expert 2: " in result.output
    found = json.loads((tmp_path / "found" / "diagnosis.json").read_text())
    assert found["training_samples"] == [5, 6, 7] and len(found["swap_losses"]) == 3
    assert Image.open(tmp_path / "found" / "diagnosis.png").size[0] > 500


def test_columns_by_other_names(digits, tmp_path):
    dataset = load_images(str(digits)).select(range(20)).rename_columns({"image": "picture", "label": "digit"})
    dataset.to_parquet(tmp_path / "train.parquet")
    ClassConditionalPipeline(randomised(DiTModel(**DIT, num_classes=10)), DDIMScheduler()).save_pretrained(
        tmp_path / "pipeline"
    )
    asked = ["diagnose", tmp_path / "pipeline", "--dataset", tmp_path / "train.parquet", "--output_dir", tmp_path / "found",
             "--num_images", 8, "--image_column", "picture"]  # fmt: skip
    with pytest.raises(
        ValueError, match="labels in the column 'label' for a model of 10 classes, but got the columns"
    ):
        CliRunner().invoke(app, [str(each) for each in asked], catch_exceptions=False)
    CliRunner().invoke(app, [*(str(each) for each in asked), "--label_column", "digit"], catch_exceptions=False)
    assert len(json.loads((tmp_path / "found" / "diagnosis.json").read_text())["swap_losses"]) == 1


def test_images_are_read_as_the_training_read_them(tmp_path):
    """Grey photos, whose top and bottom alone are cropped, and padded ones have other losses; all is grey on grey."""
    (tmp_path / "wide").mkdir()
    for index in range(8):
        Image.new("L", (16, 8), 127 + index % 2).save(tmp_path / "wide" / f"{index}.png")
    images = load_images(str(tmp_path / "wide"))
    assert diagnose(split_pipeline(), images, num_bands=4).band_losses[0][0] < 0.1  # grey is what the expert knows
    padded = diagnose(split_pipeline(), images, num_bands=4, image_fit="pad", background="black")
    assert padded.band_losses[0][0] > 10
    grey = diagnose(split_pipeline(), images, num_bands=4, image_fit="pad", background="#7f7f7f")
    assert grey.band_losses[0][0] < 0.1


def test_the_training_says_how_images_are_read(tmp_path, capsys):
    assert reading_of_training({}) == {"image_fit": "crop", "background": "white"}
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "encoding.json").write_text('{"image_fit": "pad"}')
    training = {"dataset": str(tmp_path / "latents"), "background": "black"}
    assert reading_of_training(training) == {"image_fit": "pad", "background": "white"}

    (tmp_path / "wide").mkdir()
    for index in range(8):
        Image.new("L", (16, 8), 255).save(tmp_path / "wide" / f"{index}.png")
    model = randomised(DiTModel(**DIT, num_classes=1))
    ClassConditionalPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "training_arguments.yaml").write_text("image_fit: pad\nbackground: black\n")

    def losses(folder: str, *options: str) -> list[list[float]]:
        asked = ["diagnose", tmp_path / folder, "--dataset", tmp_path / "wide", "--output_dir", tmp_path, *options]
        CliRunner().invoke(app, [str(each) for each in asked], catch_exceptions=False)
        return json.loads((tmp_path / "diagnosis.json").read_text())["band_losses"]

    padded, as_white = losses("run"), losses("run", "--background", "white")
    assert padded == losses("run/pipeline") == losses("run", "--image_fit", "pad", "--background", "black")
    assert padded != as_white == losses("run", "--image_fit", "crop")  # white on white is all white

    (tmp_path / "wide" / "cut.png").write_bytes((tmp_path / "wide" / "0.png").read_bytes()[:45])
    with pytest.raises(ValueError, match="1 of 9 are not: .*cut.png.*`--skip_unreadable` goes on without them"):
        losses("run")
    assert losses("run", "--skip_unreadable") == padded


def test_latents_are_not_images(grey):
    latents = grey.add_column("latents", [b""] * len(grey))
    with pytest.raises(ValueError, match="Expected `dataset` to hold images, but got latents"):
        diagnose(split_pipeline(), latents)


def test_another_pipeline_names_what_takes_any():
    pipeline = RECIPES["sd3"].pipe(RECIPES["sd3"].denoiser())
    with pytest.raises(ValueError, match="but got a StableDiffusion3Pipeline, .*diagnose_denoiser` takes any"):
        diagnose(pipeline, [])


def test_loras_for_intervals_are_not_taken_for_one_model():
    model = DiTModel(**DIT)
    for name in ("low", "high"):
        model.add_adapter(LoraConfig(r=1, target_modules="all-linear"), name)
    LoraExperts(["low", "high"], NoiseIntervals.from_timesteps([BOUNDARY])).attach(model)
    with pytest.raises(ValueError, match="2 intervals, but got LoRA experts on one model; .*diagnose_denoiser"):
        diagnose(ClassConditionalPipeline(transformer=model, scheduler=DDIMScheduler()), [])
