"""The beginning and the end of `make demo-fashion`.

`python examples/fashion_demo.py data` writes Fashion-MNIST, `… report FOLDER` samples from what was trained on it.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from digits_demo import write_results

import diffusers_dmp  # noqa: F401  registers the pipeline with Diffusers
from diffusers_dmp.evaluation.fashion import CLASSES, write_fashion
from diffusers_dmp.evaluation.judge import load_judge, share_recognised
from diffusers_dmp.plots import sample_grid, specialisation_figures
from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.terminal import OneLineParser, run_command

DATA, OUTPUT = Path("outputs/fashion"), Path("outputs/dtr_fashion")
JUDGE = Path(__file__).parents[1] / "docs/results/extractors/fashion/judge.safetensors"
SAMPLES_PER_CLASS, SHOWN_PER_CLASS = 50, 6
SETTINGS = {"guidance_scale": 1.5, "num_inference_steps": 25}
PIXEL_SIZE = 4  # enlarged with nearest neighbour


def report(folder: Path) -> None:
    """Sample from a trained pipeline, and write samples, figures and the share that a classifier of clothes recognises."""
    training = read_json(folder / "training_summary.json")  # first, as it is written last
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    labels = [label for label in range(len(CLASSES)) for _ in range(SAMPLES_PER_CLASS)]
    images = pipeline(labels, generator=torch.Generator().manual_seed(0), **SETTINGS).images

    columns = [
        images[label * SAMPLES_PER_CLASS :][: min(SHOWN_PER_CLASS, SAMPLES_PER_CLASS)] for label in range(len(CLASSES))
    ]
    sample_grid(columns, PIXEL_SIZE).save(folder / "samples.png")
    steps = SETTINGS["num_inference_steps"]
    for name, figure in specialisation_figures(pipeline, num_inference_steps=steps, training_summary=training).items():
        figure.savefig(folder / f"{name}.png", dpi=120)

    pictures = np.stack([np.asarray(image) for image in images])
    recognised = share_recognised(load_judge(JUDGE), pictures, np.array(labels))
    settings = {"samples": len(images)} | SETTINGS
    summary = {"recognised": recognised} | settings
    summary |= {"parameters": pipeline.transformer.num_parameters()}
    summary |= {name: training[name] for name in ("steps", "train_seconds")}
    result = {"metric": "recognised", "value": recognised, "dataset": "Fashion-MNIST", "settings": settings}
    write_results(folder, summary, [result])
    print(
        f"Of {len(images)} pictures, a classifier recognises {recognised:.1%} as the class asked for. "
        f"Look at {folder / 'samples.png'}, a column for each of {', '.join(CLASSES)}."
    )


def main(argv: list[str]) -> None:
    """Do the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("part", choices=("data", "report"))
    parser.add_argument("folder", type=Path, nargs="?", default=OUTPUT, help="the training's output_dir")
    args = parser.parse_args(argv)
    if args.part == "data":
        write_fashion(DATA)
    else:
        report(args.folder)


if __name__ == "__main__":
    run_command(main)
