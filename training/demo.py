"""The demo's two ends: `python training/demo.py data` writes the digits, `… report FOLDER` loads what was trained on them.

`report` runs in a process of its own, so that nothing but the pipeline folder links it with the training.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure

from diffusers_dmp import (  # registers the pipeline with Diffusers, too
    DTRTransformer2DModel,
    RemixDiTModel,
    SNRSplitPipeline,
)
from diffusers_dmp.digits import NUM_CLASSES, TRAINING_IMAGES, VALIDATION_IMAGES, fit_reader, write_image_folder
from diffusers_dmp.plots import (
    gate_figure,
    mixing_figure,
    prompt_usage_figure,
    routing_figure,
    sample_grid,
    snr_split_figure,
    training_share_figure,
)

OUTPUT = Path("outputs/demo")
SAMPLES_PER_CLASS = 50
GUIDANCE_SCALE = 1.5
NUM_INFERENCE_STEPS = 25


def report(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    labels = [label for label in range(NUM_CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    generator = torch.Generator(pipeline.device).manual_seed(0)
    images = pipeline(
        labels, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS, generator=generator
    ).images

    columns = [images[label * SAMPLES_PER_CLASS :][: min(8, SAMPLES_PER_CLASS)] for label in range(NUM_CLASSES)]
    sample_grid(columns, pixel_size=6).save(folder / "samples.png")
    training = json.loads((folder / "training_summary.json").read_text())
    pictures = specialisation_figures(pipeline, training)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)

    pixels = pipeline.image_processor.pil_to_numpy(images).reshape(len(images), -1)  # (N, 64) in [0, 1]
    recognised = (fit_reader().predict(pixels) == labels).mean()
    summary = {
        "recognised": round(float(recognised), 4),
        "samples": len(images),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "parameters": sum(denoiser.num_parameters() for denoiser in pipeline.denoisers),
        "steps": training["steps"],
        "train_seconds": training["train_seconds"],
    }
    if getattr(pipeline, "prompt_patch", None) is not None:
        summary["patch_parameters"] = pipeline.prompt_patch.num_parameters()
    if "validation_loss" in training.get("after", {}):
        summary["validation_loss"] = {when: training[when]["validation_loss"] for when in ("before", "after")}
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(
        f"The pipeline is in {folder / 'pipeline'}. Look at {', '.join(f'{name}.png' for name in ('samples', *pictures))}."
    )


def specialisation_figures(pipeline: DiffusionPipeline, training: dict) -> dict[str, Figure]:
    """What shows how the model's parts share the noise levels."""
    model = pipeline.denoisers[0]
    if isinstance(pipeline, SNRSplitPipeline):
        return {"snr_split": snr_split_figure(pipeline, NUM_INFERENCE_STEPS)}
    if pipeline.prompt_patch is not None:
        timesteps = torch.arange(0, model.config.num_train_timesteps, 25)
        gates = pipeline.prompt_patch.gate_weights(timesteps)
        return {"gates": gate_figure(gates, timesteps), "prompt_usage": prompt_usage_figure(gates)}
    if isinstance(model, DTRTransformer2DModel):
        return {"routing": routing_figure(model)}
    if isinstance(model, RemixDiTModel):
        before, after = (training[when]["mixing_coefficients"] for when in ("before", "after"))
        edges = model.intervals.edges
        return {
            "mixing": mixing_figure(before, after, edges),
            "training_share": training_share_figure(training["samples_per_expert"], edges),
        }
    return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("data", "report"))
    parser.add_argument("folder", type=Path, nargs="?", default=OUTPUT, help="a training's output_dir, for `report`")
    args = parser.parse_args()
    if args.part == "data":
        write_image_folder(OUTPUT / "digits")
        write_image_folder(OUTPUT / "digits_train", TRAINING_IMAGES)
        write_image_folder(OUTPUT / "digits_validation", VALIDATION_IMAGES)
    else:
        report(args.folder)
