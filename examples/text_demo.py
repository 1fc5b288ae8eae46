"""The beginning and the end of the text demo, `make demo-text`.

`python examples/text_demo.py data` writes pictures with captions, and a pipeline whose transformer has random weights.
`… clothes` draws from prompts with what was trained from it on Fashion-MNIST, and `… digits` compares one LoRA with LoRA experts,
which adapt it to handwritten digits at equal parameters.

The reports run in processes of their own, which share nothing but folders with the training.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from diffusers_dmp import LoraExperts, SentenceToImagePipeline
from diffusers_dmp.evaluation.denoiser_diagnostics import DiagnosisOptions, diagnose_denoiser
from diffusers_dmp.evaluation.digits import (
    DIGIT_PHRASES,
    DIGITS,
    TRAINING_IMAGES,
    VALIDATION_IMAGES,
    enlarged_digits,
    fit_reader,
    fit_resnet,
)
from diffusers_dmp.evaluation.fashion import CLOTHES, captions_of, fashion_images, write_captioned_images
from diffusers_dmp.evaluation.text_model import new_pipeline
from diffusers_dmp.intervals import NoiseIntervals
from diffusers_dmp.models.vision import ImagePreprocessor
from diffusers_dmp.plots import comparison_figure, sample_grid
from diffusers_dmp.terminal import OneLineParser, run_command

OUTPUT = Path("outputs/demo_text")
STARTED = "started"  # holds when the demo began
HELD_OUT = 1000  # pictures of clothes for the validation loss
# words of no caption, which only the encoder of sentences knows
UNSEEN = ("jeans", "a jumper", "high heels", "a blouse", "trainers", "a handbag", "a rucksack", "wellingtons")
ADAPTATIONS = {"one LoRA": "lora", "two experts": "lora_experts_2", "four experts": "lora_experts_4"}
NUM_BANDS = 4  # of noise levels, for the losses
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 4
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 25
SAMPLE_BATCH = 100


def write_data(folder: Path) -> None:
    """Write the pictures with captions of both data sets, and the pipeline that the training starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STARTED).write_text(str(time.time()))
    for split, name in (("train", "train"), ("test", "validation")):
        images, labels = fashion_images(split)
        images, labels = (images, labels) if split == "train" else (images[:HELD_OUT], labels[:HELD_OUT])
        write_captioned_images(folder / f"clothes_{name}" / "train.parquet", images, captions_of(labels))
    scans, labels = enlarged_digits()
    for name, rows in (("train", TRAINING_IMAGES), ("validation", VALIDATION_IMAGES)):
        captions = captions_of(labels[rows], DIGITS, DIGIT_PHRASES)
        write_captioned_images(folder / f"digits_{name}" / "train.parquet", scans[rows], captions)
    new_pipeline().save_pretrained(folder / "start")


def report_clothes(folder: Path) -> None:
    """Draw clothes from prompts, also in words of no caption, and count those that a classifier of the real ones recognises."""
    pipeline = loaded(folder / "base" / "pipeline")
    prompts = [f"a photo of {name}" for name in CLOTHES for _ in range(SAMPLES_PER_CLASS)]
    images = draw(pipeline, prompts)
    as_grid(images).save(folder / "clothes.png")
    unseen = draw(pipeline, [f"a photo of {name}" for name in UNSEEN for _ in range(SHOWN_PER_CLASS)])
    as_grid(unseen, per_class=SHOWN_PER_CLASS).save(folder / "unseen.png")

    classifier = fit_resnet(folder / "classifier", fashion_images()[0][..., None], fashion_images()[1], list(CLOTHES))
    real, real_labels = fashion_images("test")
    labels = np.arange(len(CLOTHES)).repeat(SAMPLES_PER_CLASS)
    summary = {
        "recognised": share_recognised(classifier, np.stack([np.asarray(image) for image in images]), labels),
        "recognised_of_real_pictures": share_recognised(classifier, real, real_labels),
        "samples": len(images),
        **sampling_settings(),
        "parameters": pipeline.transformer.num_parameters(),
        **training_figures(folder / "base"),
    }
    write_json(folder / "clothes.json", summary)
    print(f"The pipeline is in {folder / 'base' / 'pipeline'}. Look at clothes.png and unseen.png.")


def report_digits(folder: Path) -> None:
    """Compare the adaptations to digits: held-out losses by noise level, and pictures from the same noise."""
    pipeline = loaded(folder / "base" / "pipeline")
    prompts = [f"a handwritten {name}" for name in DIGITS for _ in range(SAMPLES_PER_CLASS)]
    labels = np.arange(len(DIGITS)).repeat(SAMPLES_PER_CLASS)
    reader = fit_reader()
    summary: dict[str, Any] = {"samples": len(prompts), **sampling_settings(), "adaptations": {}}
    grids = {}
    for title, name in {"base model": None, **ADAPTATIONS}.items():
        with adapted(pipeline, name and folder / name):
            images = draw(pipeline, prompts)
            scans = np.stack([np.asarray(image.resize((8, 8), Image.BOX)) for image in images])
            recognised = float((reader.predict(scans.reshape(len(scans), -1) / 255) == labels).mean())
            summary["adaptations"][title] = {
                "held_out_loss": held_out_losses(pipeline),
                "recognised": round(recognised, 4),
                **({} if name is None else training_figures(folder / name)),
            }
        grids[f"{title}: {recognised:.0%} recognised"] = as_grid(images, pixel_size=1)
    comparison_figure(grids).savefig(folder / "digits.png", dpi=100)
    if (folder / STARTED).exists():  # breaks count, if the demo was interrupted
        summary["total_seconds"] = round(time.time() - float((folder / STARTED).read_text()))
    write_json(folder / "digits.json", summary)
    (folder / "digits.md").write_text(loss_table(summary["adaptations"]))
    print(loss_table(summary["adaptations"]), f"Look at {folder / 'digits.png'}.", sep="\n")


def loaded(folder: Path) -> SentenceToImagePipeline:
    """A saved pipeline, found by the class that its folder names."""
    pipeline = DiffusionPipeline.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def adapted(pipeline: SentenceToImagePipeline, folder: Path | None) -> Iterator[None]:
    """Let the LoRAs of a training act for a while, each at the noise levels of its own."""
    if folder is None:
        yield
        return
    experts = LoraExperts.from_pretrained(folder / "loras").attach(pipeline)
    yield
    experts.detach()


def draw(pipeline: SentenceToImagePipeline, prompts: list[str]) -> list[Image.Image]:
    """Draw a picture for each prompt; the i-th one always begins with the same noise."""
    images = []
    for begin in range(0, len(prompts), SAMPLE_BATCH):
        part = prompts[begin : begin + SAMPLE_BATCH]
        generators = [torch.Generator().manual_seed(begin + index) for index in range(len(part))]
        images += pipeline(
            part, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS, generator=generators
        ).images
    return images


def as_grid(images: list[Image.Image], pixel_size: int = 2, per_class: int | None = None) -> Image.Image:
    """The first pictures of each class, in a column; `images` holds `per_class` of each, one class after the other."""
    columns = [images[begin:][:SHOWN_PER_CLASS] for begin in range(0, len(images), per_class or SAMPLES_PER_CLASS)]
    return sample_grid(columns, pixel_size=pixel_size)


@torch.no_grad()
def share_recognised(classifier: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of pictures (N, 28, 28) that a classifier takes for what they should be."""
    preprocess = ImagePreprocessor([0.5], [0.5], [32, 32])  # as `fit_resnet` trains it
    pixels = torch.from_numpy(images).float().unsqueeze(1) / 127.5 - 1
    predicted = torch.cat([classifier(preprocess(part)).logits.argmax(1) for part in pixels.split(SAMPLES_PER_CLASS)])
    return round(float((predicted.numpy() == labels).mean()), 4)


def held_out_losses(pipeline: SentenceToImagePipeline) -> dict[str, float]:
    """The mean squared error of the velocity of held-out digits, in equal bands of σ; the noise is always the same."""
    scans, labels = enlarged_digits()
    rows = VALIDATION_IMAGES
    prompt_embeds, pooled = pipeline.encode_prompt(captions_of(labels[rows], DIGITS, DIGIT_PHRASES))
    latents = torch.from_numpy(scans[rows]).float().unsqueeze(1).to(pipeline.device) / 127.5 - 1
    diagnosis = diagnose_denoiser(
        pipeline.transformer,
        latents,
        {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled},
        pipeline.scheduler,
        options=DiagnosisOptions(num_bands=NUM_BANDS),
    )
    intervals = NoiseIntervals(tuple(diagnosis.edges))
    middles = (torch.arange(NUM_BANDS) + 0.5) / NUM_BANDS * diagnosis.bands[-1]
    owners = intervals.index(middles).tolist()  # a band belongs to one expert: all boundaries are edges of bands
    names = [f"{low / 1000:g} to {high / 1000:g}" for low, high in zip(diagnosis.bands, diagnosis.bands[1:])]
    losses = [round(diagnosis.band_losses[owner][band], 5) for band, owner in enumerate(owners)]
    return dict(zip(names, losses, strict=True)) | {"mean": round(sum(losses) / NUM_BANDS, 5)}


def loss_table(adaptations: dict[str, Any]) -> str:
    """The held-out losses side by side, in Markdown."""
    bands = list(next(iter(adaptations.values()))["held_out_loss"])
    lines = [
        ["", *(f"σ {band}" if band != "mean" else band for band in bands), "recognised"],
        ["---"] * (len(bands) + 2),
    ]
    for title, figures in adaptations.items():
        losses = [f"{loss:.4f}" for loss in figures["held_out_loss"].values()]
        lines.append([title, *losses, f"{figures['recognised']:.1%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def sampling_settings() -> dict[str, Any]:
    """How the pictures are drawn."""
    return {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": NUM_INFERENCE_STEPS}


def training_figures(folder: Path) -> dict[str, Any]:
    """What a training says of itself that the reports repeat."""
    training = json.loads((folder / "training_summary.json").read_text())
    return {name: training[name] for name in ("steps", "train_seconds", "trainable_parameters") if name in training}


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Write a report, and show it."""
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(path.read_text())


def main(argv: list[str]) -> None:
    """Do the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parts = {"data": write_data, "clothes": report_clothes, "digits": report_digits}
    parser.add_argument("part", choices=tuple(parts))
    parser.add_argument("folder", type=Path, nargs="?", default=OUTPUT, help="where everything is written")
    args = parser.parse_args(argv)
    parts[args.part](args.folder)


if __name__ == "__main__":
    run_command(main)
