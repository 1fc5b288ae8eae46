"""The demo's two ends: `python training/demo.py data` writes the digits, `… report` loads what was trained on them.

`report` runs in a process of its own, so that nothing but the pipeline folder links it with the training.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import diffusers_dmp  # noqa: F401  registers the pipeline with Diffusers
from diffusers_dmp.digits import NUM_CLASSES, fit_reader, write_image_folder
from diffusers_dmp.plots import routing_figure, sample_grid

OUTPUT = Path("outputs/demo")
SAMPLES_PER_CLASS = 50
GUIDANCE_SCALE = 1.5
NUM_INFERENCE_STEPS = 25


def report() -> None:
    pipeline = DiffusionPipeline.from_pretrained(OUTPUT / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    labels = [label for label in range(NUM_CLASSES) for _ in range(SAMPLES_PER_CLASS)]
    generator = torch.Generator(pipeline.device).manual_seed(0)
    images = pipeline(
        labels, guidance_scale=GUIDANCE_SCALE, num_inference_steps=NUM_INFERENCE_STEPS, generator=generator
    ).images

    columns = [images[label * SAMPLES_PER_CLASS :][: min(8, SAMPLES_PER_CLASS)] for label in range(NUM_CLASSES)]
    sample_grid(columns, pixel_size=6).save(OUTPUT / "samples.png")
    routing_figure(pipeline.transformer).savefig(OUTPUT / "routing.png", dpi=120)

    pixels = pipeline.image_processor.pil_to_numpy(images).reshape(len(images), -1)  # (N, 64) in [0, 1]
    recognised = (fit_reader().predict(pixels) == labels).mean()
    training = json.loads((OUTPUT / "training_summary.json").read_text())
    summary = {
        "recognised": round(float(recognised), 4),
        "samples": len(images),
        "guidance_scale": GUIDANCE_SCALE,
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "parameters": pipeline.transformer.num_parameters(),
        **training,
    }
    (OUTPUT / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(f"Look at {OUTPUT / 'samples.png'} and {OUTPUT / 'routing.png'}; the pipeline is in {OUTPUT / 'pipeline'}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("data", "report"))
    if parser.parse_args().part == "data":
        write_image_folder(OUTPUT / "digits")
    else:
        report()
