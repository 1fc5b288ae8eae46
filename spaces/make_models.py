"""Train the Space's pipelines on Fashion-MNIST, and generate its example pictures and the README's first one.

Run from the repository's root: `python spaces/make_models.py`, or `… dtr patch` for some of the pipelines, `… examples` for the
pictures alone. Pipelines are written to `spaces/models` in float16, pictures to `spaces/pictures`, what the pipelines are like to
`spaces/models.json`. What is trained already is not trained again, and what was interrupted goes on.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from examples import EXAMPLES
from PIL import Image
from showcase import ALL_CLASSES, TITLES, ShownPipeline
from studio import Studio
from trainings import RUN_FILES, needed, plan, records_of, run_all, say

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.evaluation.fashion import CLASSES, write_fashion
from diffusers_dmp.evaluation.judge import load_judge, share_recognised
from diffusers_dmp.plots import sample_grid
from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.saving.whole import write_json, written_whole
from diffusers_dmp.terminal import OneLineParser, run_command

sys.path.append(str(Path(__file__).parents[1]))  # for `benchmarks`

from benchmarks.scripts import only_one
from benchmarks.timing import hardware

SPACE = Path(__file__).resolve().parent
EXAMPLES_ONLY = "examples"
# by system, the training whose pipeline it shows, and what else it shows
TRAINED = {
    "dtr": ("dtr",),
    "remix": ("remix",),
    "dmp": ("dmp",),
    "patch": ("patch",),
    "ppap": ("unconditional", "guide", "ppap_experts"),
}
MODELS, PICTURES, REPORT = "models", "pictures", "models.json"
SYSTEMS_PICTURE = "systems.png"  # the README's
JUDGE = SPACE.parent / "docs/results/extractors/fashion/judge.safetensors"
SAMPLES_PER_CLASS, BATCH_PER_CLASS = 100, 25  # for the share that is recognised
SAMPLING: dict[str, Any] = {"num_inference_steps": 25, "scheduler": "DDPM"}  # of that, and of the README's picture
PIXEL_SIZE = 4
NUM_GREYS = 64


def ship(name: str, work: Path, folder: Path) -> None:
    """Copy a trained pipeline to the Space's folder, in float16, over what was there before."""
    trained = work / TRAINED[name][0] / "pipeline"
    with written_whole(folder) as unfinished:
        DiffusionPipeline.from_pretrained(trained, dtype=torch.float16).save_pretrained(unfinished)
        if name == "ppap":
            # in float32 as trained: the experts check their network's checksum
            base_model = unfinished / "base_model"
            shutil.copytree(work / "guide", base_model, ignore=shutil.ignore_patterns(*RUN_FILES))
            experts = GuidanceExperts.from_pretrained(work / "ppap_experts/experts", base_model=base_model)
            experts.register_to_config(base_model_name_or_path="base_model")
            experts.save_pretrained(unfinished / "experts")


def load_shipped(models: Path) -> dict[str, ShownPipeline]:
    """
    Load the pipelines that are there. On the CPU, so that pictures are those of a Space without a GPU.

    Raises:
        ValueError: if there are none.
    """
    names = [name for name in TITLES if (models / name).is_dir()]
    if not names:
        raise ValueError(f"Expected {models} to hold pipelines, at least one of {', '.join(TITLES)}, but got none.")
    return {name: ShownPipeline.load(name, models / name, "cpu") for name in names}


def describe(name: str, shown: ShownPipeline, work: Path, folder: Path, per_class: int) -> dict[str, Any]:
    """
    Describe a pipeline that was just trained.

    Args:
        name (`str`), shown ([`ShownPipeline`]): The pipeline.
        work (`Path`): The folder of what was trained.
        folder (`Path`): Where the pipeline is shipped.
        per_class (`int`): Images of each class that a judge looks at.

    Returns:
        The share of images that is `recognised`, the size of the files, how long it was trained, on what, and by which commit.
    """
    records = records_of(needed(plan(Path(), work), TRAINED[name]), work)
    say(f"{name}: recognising {per_class * len(CLASSES):,} images")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "recognised": recognised(shown, per_class),
        "images": per_class * len(CLASSES),
        "scale": shown.default_scale,
        **SAMPLING,
        "megabytes": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 2),
        "training_seconds": {training: record["seconds"] for training, record in records.items()},
        "device": hardware(device),
        "commit": ", ".join(sorted({record["commit"] for record in records.values()})),
    }


def recognised(shown: ShownPipeline, per_class: int) -> float:
    """Return the share of images whose class a judge recognises, a network of another kind than the one that guides."""
    images: list[Image.Image] = []
    labels: list[int] = []
    for seed, first in enumerate(range(0, per_class, BATCH_PER_CLASS)):
        count = min(BATCH_PER_CLASS, per_class - first) * len(CLASSES)
        images += shown.generate(ALL_CLASSES, count, scale=shown.default_scale, seed=seed, **SAMPLING)
        labels += shown.labels(ALL_CLASSES, count)
    return share_recognised(load_judge(JUDGE), np.stack([np.asarray(image) for image in images]), np.array(labels))


def make_pictures(shown: dict[str, ShownPipeline], folder: Path) -> None:
    """Generate the pictures that the Space shows at once, and one of all systems, a row of each, from the same noise."""
    studio = Studio(shown)
    rows = [
        each.generate(ALL_CLASSES, len(CLASSES), scale=each.default_scale, seed=0, **SAMPLING)
        for each in shown.values()
    ]
    with written_whole(folder) as unfinished:
        unfinished.mkdir()
        for request, examples in EXAMPLES.items():
            for example in examples:
                if not set(example.systems) <= set(shown):
                    continue
                answer = getattr(studio, request)(*example.values)
                first = answer[0]  # a picture, or the pictures of a comparison with their captions
                pictures = [picture for picture, _ in first] if isinstance(first, list) else answer[:2]
                pictures = [picture for picture in pictures if isinstance(picture, Image.Image)]
                for picture, path in zip(pictures, example.paths(len(pictures))):
                    save(picture, unfinished / path.name)
        columns = [list(column) for column in zip(*rows, strict=True)]
        save(sample_grid(columns, PIXEL_SIZE), unfinished / SYSTEMS_PICTURE)


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with few colours."""
    picture.quantize(NUM_GREYS).save(path, optimize=True)


def main(argv: list[str]) -> None:
    """Do what the command line asks for."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRAINED)}; all by default; or '{EXAMPLES_ONLY}'")
    parser.add_argument("--jobs", type=int, help="trainings at a time; one for each core by default, on a GPU all")
    parser.add_argument(
        "--data", type=Path, default=Path("outputs/fashion"), help="where the data set is, or is written"
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/space"), help="where everything is trained")
    parser.add_argument("--output", type=Path, default=SPACE, help="the Space's folder")
    parser.add_argument(
        "--shorter", type=int, default=1, help="divide the numbers of steps by this, for a quick trial"
    )
    args = parser.parse_args(argv)
    names = args.names or list(TRAINED)
    models, pictures, report = (args.output / each for each in (MODELS, PICTURES, REPORT))
    if names == [EXAMPLES_ONLY]:
        make_pictures(load_shipped(models), pictures)
        return
    unknown = sorted(set(names) - set(TRAINED))
    if unknown:
        parser.error(f"Expected `names` to be among {', '.join(TRAINED)}, but got {', '.join(unknown)}.")
    for option in ("jobs", "shorter"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"Expected `{option}` to be at least 1, but got {getattr(args, option)}.")

    if args.shorter > 1 and args.output.resolve() == SPACE:
        parser.error(f"Expected `output` to be a folder of its own with `shorter`, but got the repository's, {SPACE}.")

    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the trainings end in order
    with only_one(args.work, "`make_models.py`"):
        train(names, args)
        for name in names:
            ship(name, args.work, models / name)
        say("Pictures")
        shown = load_shipped(models)
        make_pictures(shown, pictures)
        described = read_json(report) if report.exists() else {}
        per_class = max(1, SAMPLES_PER_CLASS // args.shorter)
        described |= {name: describe(name, shown[name], args.work, models / name, per_class) for name in names}
        write_json(report, described)
    print(json.dumps(described, indent=2))


def train(names: list[str], args: argparse.Namespace) -> None:
    """Train what these pipelines need, unless that is done."""
    on_gpu, cores = torch.cuda.is_available(), int(os.environ.get("CPU_THREADS") or os.cpu_count() or 1)
    everything = plan(args.data / "train", args.work, args.shorter)
    trainings = needed(everything, [each for name in names for each in TRAINED[name]])
    say(f"Fashion-MNIST: {args.data}")
    write_fashion(args.data)
    run_all(trainings, args.work, args.jobs or (len(trainings) if on_gpu else cores), cores, on_gpu)


if __name__ == "__main__":
    run_command(main, name="make_models")
