"""One run of a plan: trained by the training script as any user would, drawn from and measured by the package's evaluation.

Legend: N images.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from benchmarks.timing import hardware
from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, SNRSplitPipeline
from diffusers_dmp.evaluation.costs import gigaflops_of
from diffusers_dmp.evaluation.digits import NUM_CLASSES, fit_reader
from diffusers_dmp.evaluation.evaluate import EvaluationArguments, evaluate
from diffusers_dmp.evaluation.images import DatasetImages, open_images
from diffusers_dmp.evaluation.npz import NpzImages, write_npz
from diffusers_dmp.evaluation.sample import (
    NPZ_NAME,
    SETTINGS_NAME,
    SamplingArguments,
    sample_images,
    sampling_settings,
)
from diffusers_dmp.training.data.seeded_sampling import load_sampling_pipeline, sample_seeded
from diffusers_dmp.training.data.shards import remember_settings

from .data import EXTRACTOR, GUIDE, HELD_OUT, MAKERS, TRAIN, noise_images
from .plan import TRAINED, Plan, Run

SUMMARY = "training_summary.json"
METRICS = ("FID", "KID", "precision", "recall", "recognised")  # of which the results keep account
BATCH_SIZE = 100
COST_BATCH = 10  # images that are drawn to count operations
RECORD, RUN_RECORD = "made.json", "run.json"  # of a data set, of a run
TRAINED_RECORD, DRAWN_RECORD = "trained.json", "drawn.json"  # of what a run has done, and how long it took
EXTRACTORS = "extractors"  # their folder in the results


def make_data(plan: Plan, name: str, results: Path) -> None:
    """
    The data set, unless it is there. What looks at its images comes from the `results` where they have it, for it does not come
    out the same on every machine, and goes there where they have not.
    """
    folder, kept = plan.data_folder(name), results / EXTRACTORS / name
    if not (folder / RECORD).exists():
        shutil.rmtree(folder, ignore_errors=True)  # what was interrupted
        MAKERS[name](folder, **plan.data[name])
        if kept.exists():
            shutil.rmtree(folder / EXTRACTOR)
            shutil.copytree(kept, folder / EXTRACTOR)
    remember_settings(folder / RECORD, plan.data[name], "images")
    if not kept.exists():
        shutil.copytree(folder / EXTRACTOR, kept)


def measure_bounds(plan: Plan, name: str) -> dict[str, Any]:
    """What images can come to at best and at worst: real ones that were not trained on, and noise, as many of each as are drawn."""
    folder = plan.data_folder(name)
    held_out = DatasetImages(str(folder / HELD_OUT))
    size = next(held_out.batches(1)).shape[1:]
    noise = folder / "noise" / NPZ_NAME
    noise.parent.mkdir(exist_ok=True)
    write_npz(noise, [noise_images(len(held_out), size)], (len(held_out), *size))
    bounds = {}
    for bound, source in (("real", folder / HELD_OUT), ("noise", noise)):
        figures, fingerprint = _measure(plan, name, source)
        bounds[bound] = figures | {"fingerprint": fingerprint}
    return bounds | {"settings": plan.data[name], "number": len(held_out), "commit": commit()}


def perform(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """
    Train, draw and measure, or go on where that was interrupted.

    Returns:
        What the results keep: settings, command, figures at each of the steps at which there is a pipeline, parameters,
        floating-point operations of an image, milliseconds of a training step and of drawing an image, hardware and commit.

    Raises:
        RuntimeError: if the training fails.
        ValueError: if the run's folder holds one with other settings.
    """
    folder = plan.folder(run)
    remember_settings(folder / RUN_RECORD, plan.settings(run), "run")
    result = {"comparison": run.comparison, "name": run.name, "seed": run.seed, "settings": plan.settings(run)}
    if run.script:
        result |= {"command": " ".join(plan.command(run, num_threads)), **_train(plan, run, num_threads)}
    if not run.measured:
        return result
    points = []
    for step, source in _pipelines(plan, run).items():
        images, milliseconds_per_image = _draw(plan, run, source, folder / "drawn" / str(step))
        figures, fingerprint = _measure(plan, run.data, images)
        points.append({"step": step, **figures})
    labels = [index % NUM_CLASSES for index in range(COST_BATCH)]
    pipeline = _load(plan, run, source, labels)
    return result | {
        "points": points,
        "fingerprint": fingerprint,  # of the last point
        "parameters": _num_parameters(pipeline),
        "gigaflops_per_image": round(gigaflops_of(lambda: _call(plan, run, pipeline, labels)) / COST_BATCH, 5),
        "milliseconds_per_image": milliseconds_per_image,
        "hardware": hardware(pipeline.device),
        "commit": commit(),
    }


def commit() -> str:
    """Of the code that runs."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def is_trained(plan: Plan, run: Run) -> bool:
    """Whether what others may need of the run is there."""
    return not run.script or (plan.folder(run) / TRAINED_RECORD).exists()


def _train(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """Unless it is done; and how long a step took."""
    folder = plan.folder(run)
    record = folder / TRAINED_RECORD
    if not record.exists():
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        with open(folder / "training.log", "a") as log:
            done = subprocess.run(plan.command(run, num_threads), stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise RuntimeError(f"Expected the training to succeed, but got {done.returncode}; see {log.name}.")
        milliseconds = None
        if (folder / SUMMARY).exists():  # not of images that are only drawn
            training = json.loads((folder / SUMMARY).read_text())
            if training["steps"]:
                milliseconds = round(1000 * training["train_seconds"] / training["steps"], 1)
        record.write_text(json.dumps({"milliseconds_per_step": milliseconds}) + "\n")
    return json.loads(record.read_text())


def _pipelines(plan: Plan, run: Run) -> dict[int, Path]:
    """By the steps that were trained for them, in all experts together; of runs that guide, by those of one expert."""
    last = run.arguments.get("max_train_steps", 0)
    if run.base:
        return {last: plan.base(run)}
    folder = plan.folder(run)
    every = run.arguments["pipeline_steps"]
    if not every:
        return {last: folder / "pipeline"}
    steps = range(every, last + 1, every)
    experts = sorted(folder.glob("expert_*"))
    if not experts:
        return {step: folder / f"pipeline-{step}" for step in steps}
    boundaries = DiffusionPipeline.load_config(folder / "pipeline")["snr_boundaries"]
    together = {}
    for step in steps:
        parts = [DiffusionPipeline.from_pretrained(expert / f"pipeline-{step}") for expert in experts]
        together[step * len(experts)] = folder / "together" / str(step)
        SNRSplitPipeline.from_pipelines(parts, boundaries).save_pretrained(folder / "together" / str(step))
    return together


def _draw(plan: Plan, run: Run, source: Path, folder: Path) -> tuple[Path, float]:
    """
    As many images as are held out, in the classes in turn where there are any, unless they are there; and the milliseconds that
    one took.
    """
    path, record = folder / NPZ_NAME, folder / DRAWN_RECORD
    if record.exists():
        return path, json.loads(record.read_text())["milliseconds_per_image"]
    arguments = SamplingArguments(
        pipeline=str(source),
        output_dir=str(folder),
        num_samples=len(DatasetImages(str(plan.data_folder(run.data) / HELD_OUT))),
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=1.0,
        batch_size=BATCH_SIZE,
        seed=run.seed,
        scheduler=run.scheduler,
    )
    started = time.perf_counter()
    if run.guide:
        _draw_guided(plan, run, arguments, path)
    else:
        sample_images(arguments)
    milliseconds = round(1000 * (time.perf_counter() - started) / arguments.num_samples, 2)
    record.write_text(json.dumps({"milliseconds_per_image": milliseconds}) + "\n")
    return path, milliseconds


def _draw_guided(plan: Plan, run: Run, arguments: SamplingArguments, path: Path) -> None:
    """[`sample_images`] where a classifier says what to draw."""
    number = arguments.num_samples
    labels = [index % NUM_CLASSES for index in range(number)]
    pipeline, experts = load_sampling_pipeline(arguments.pipeline, arguments, _device()), _experts(plan, run)
    settings = sampling_settings(arguments, pipeline, Path(arguments.pipeline))
    remember_settings(path.parent / SETTINGS_NAME, settings | {"guidance_scale": plan.guidance_scale}, "images")
    scheduler = pipeline.scheduler

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, number, BATCH_SIZE):
            own = labels[start : start + BATCH_SIZE]
            pipeline.scheduler = GuidedScheduler(scheduler, experts, ClassTarget(own), plan.guidance_scale)
            images = _call(plan, run, pipeline, own, start)
            yield np.stack([np.asarray(image.convert("RGB")) for image in images])

    size = pipeline.denoisers[0].config.sample_size
    write_npz(path, batches(), (number, size, size, 3), np.array(labels))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _experts(plan: Plan, run: Run) -> GuidanceExperts:
    """What guides: what the run has trained, or the classifier as it is, which is one expert for all noise."""
    if run.guide == TRAINED:
        return GuidanceExperts.from_pretrained(plan.folder(run) / "experts")
    return GuidanceExperts.from_base(str(plan.data_folder(run.data) / GUIDE), method="finetune", num_experts=1)


def _load(plan: Plan, run: Run, source: Path, labels: list[int]) -> DiffusionPipeline:
    """The pipeline that draws, guided or not."""
    settings = SamplingArguments(pipeline=str(source), scheduler=run.scheduler)
    pipeline = load_sampling_pipeline(settings.pipeline, settings, _device())
    if run.guide:
        target = ClassTarget(labels)
        pipeline.scheduler = GuidedScheduler(pipeline.scheduler, _experts(plan, run), target, plan.guidance_scale)
    return pipeline


def _call(
    plan: Plan, run: Run, pipeline: DiffusionPipeline, labels: list[int], first: int = 0
) -> list[PIL.Image.Image]:
    """Images number `first` and on."""
    conditional = (pipeline.num_classes or 1) > 1
    own = {"class_labels": labels, "guidance_scale": 1.0} if conditional else {"batch_size": len(labels)}
    indices = range(first, first + len(labels))
    return sample_seeded(pipeline, run.seed, indices, num_inference_steps=plan.num_inference_steps, **own)


def _measure(plan: Plan, data: str, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of an `.npz` file or a folder, against the images that were trained on, and their fingerprint."""
    folder = plan.data_folder(data)
    arguments = EvaluationArguments(
        generated=str(source),
        reference=str(folder / TRAIN),
        extractor=str(folder / EXTRACTOR),
        output=str(source.with_suffix(".evaluation.json")),
    )
    results = evaluate(arguments)
    figures = {result["metric"]: result["value"] for result in results if result["metric"] in METRICS}
    if data == "digits":
        figures["recognised"] = _recognised(source, str(folder / TRAIN))
    return figures, results[0]["settings"]


def _recognised(source: Path, train: str) -> float | None:
    """The share of the digits that another kind of model than the networks, fitted on those in `train`, takes for what they are."""
    pixels, labels = _read_digits(source)
    if labels is None:
        return None
    reader = fit_reader(*_read_digits(train))
    return round(float((reader.predict(pixels) == labels).mean()), 4)


def _read_digits(source: "str | Path") -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels in [0, 1] as (N, 64), and labels (N,) if there are any."""
    images = open_images(source)
    labels = images.labels if isinstance(images, NpzImages) else np.array(images.dataset["label"])
    pixels = np.concatenate([batch[..., 0] for batch in images.batches(BATCH_SIZE)])
    return pixels.reshape(len(pixels), -1) / 255, labels


def _num_parameters(pipeline: DiffusionPipeline) -> int:
    """Of all that draws."""
    parts = [
        *pipeline.denoisers,
        getattr(pipeline, "prompt_patch", None),
        getattr(pipeline.scheduler, "experts", None),
    ]
    return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())
