"""One run of a plan: trained by the training script that a user would call, sampled and measured by the package's evaluation."""

import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.timing import commit, hardware
from diffusers_dmp import SNRSplitPipeline
from diffusers_dmp.evaluation.costs import gigaflops_of
from diffusers_dmp.evaluation.npz import NpzImages
from diffusers_dmp.plots import sample_grid
from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.training.data.shards import remember_settings

from .losses import measure_losses
from .measure import measure
from .plan import Plan, Run
from .sampling import NUM_CLASSES, call, load_pipeline, num_parameters, sample

SUMMARY = "training_summary.json"
GRID, GRID_ROWS = "samples.png", 4
COST_BATCH = 10  # images that are sampled to count operations
RUN_RECORD = "run.json"  # the settings of what is in a run's folder
TRAINED_RECORD = "trained.json"  # written when the training is complete: how long a step took


def perform(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """
    Train, sample and measure; what is done already is not repeated.

    Args:
        plan ([`Plan`]), run ([`Run`]): What to do.
        num_threads (`int`): Threads of the training.

    Returns:
        The content of the result's file: settings, command, metrics at each step at which there is a pipeline, losses by noise
        level, number of parameters, floating-point operations per image, milliseconds per training step and per image, seconds,
        hardware and commit.

    Raises:
        RuntimeError: if the training fails.
        ValueError: if the run's folder contains a run with other settings.
    """
    started = time.monotonic()
    folder = plan.folder(run)
    remember_settings(folder / RUN_RECORD, plan.settings(run), "run")
    result = {"comparison": run.comparison, "name": run.name, "seed": run.seed, "settings": plan.settings(run)}
    if run.script:
        result |= {"command": " ".join(plan.command(run, num_threads)), **_train(plan, run, num_threads)}
    if run.measured:
        result |= _measurement(plan, run)
    seconds = round(time.monotonic() - started)  # since the last interruption
    return result | {"seconds": seconds, "commit": commit()}


def _measurement(plan: Plan, run: Run) -> dict[str, Any]:
    """Sample with each pipeline of a run, and measure the images and the last pipeline."""
    folder = plan.folder(run)
    points = []
    for step, source in _pipelines(plan, run).items():
        images, milliseconds_per_image = sample(plan, run, source, folder / "samples" / str(step))
        metrics, fingerprint = measure(plan, run.data, images)
        points.append({"step": step, **metrics})
    write_grid(images, folder / GRID)
    labels = [index % NUM_CLASSES for index in range(COST_BATCH)]
    pipeline = load_pipeline(plan, run, source, labels)
    return {
        "points": points,
        "fingerprint": fingerprint,  # of the last point
        "losses": None if run.guide else measure_losses(plan, run, pipeline),
        "parameters": num_parameters(pipeline),
        "gigaflops_per_image": round(gigaflops_of(lambda: call(plan, run, pipeline, labels)) / COST_BATCH, 5),
        "milliseconds_per_image": milliseconds_per_image,
        "hardware": hardware(pipeline.device),
    }


def write_grid(images: Path, path: Path) -> None:
    """Write the first images of an `.npz` file side by side, one column per class."""
    (first,) = islice(NpzImages(images).batches(GRID_ROWS * NUM_CLASSES), 1)
    grey = [Image.fromarray(image).convert("L") for image in first]
    with written_whole(path) as unfinished:
        sample_grid([grey[label::NUM_CLASSES] for label in range(NUM_CLASSES)]).save(unfinished, "png", optimize=True)


def is_trained(plan: Plan, run: Run) -> bool:
    """Return whether the run's training is complete, so that other runs can use its pipeline or images."""
    return not run.script or (plan.folder(run) / TRAINED_RECORD).exists()


def _train(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """Train, unless that is done, and return how long a step took."""
    folder = plan.folder(run)
    record = folder / TRAINED_RECORD
    if not record.exists():
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        with open(folder / "training.log", "a") as log:
            done = subprocess.run(plan.command(run, num_threads), stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise RuntimeError(f"Expected the training to succeed, but got {done.returncode}; see {log.name}.")
        milliseconds = None
        if (folder / SUMMARY).exists():  # a script that only samples images writes none
            training = json.loads((folder / SUMMARY).read_text())
            if training["steps"]:
                milliseconds = round(1000 * training["train_seconds"] / training["steps"], 1)
        record.write_text(json.dumps({"milliseconds_per_step": milliseconds}) + "\n")
    return json.loads(record.read_text())


def _pipelines(plan: Plan, run: Run) -> dict[int, Path]:
    """Return the folders of a run's pipelines by training step, which of several denoisers counts the steps of all."""
    folder, last = plan.folder(run), run.arguments.get("max_train_steps", 0)
    if run.base:
        return {last: plan.place(run, run.base)}
    if run.parts:
        parts = [DiffusionPipeline.from_pretrained(plan.place(run, part)) for part in run.parts]
        SNRSplitPipeline.from_pipelines(parts, run.boundaries).save_pretrained(folder / "pipeline")
        return {last: folder / "pipeline"}
    every = run.arguments["pipeline_steps"]
    if every:
        return {step: folder / f"pipeline-{step}" for step in range(every, last + 1, every)}
    return {last * run.arguments.get("num_experts", 1): folder / "pipeline"}
