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
from diffusers_dmp.costs import gigaflops_of
from diffusers_dmp.digits import NUM_CLASSES, fit_reader
from diffusers_dmp.drawing import draw, load_to_draw
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
from diffusers_dmp.training.shards import remember_settings

from .data import EXTRACTOR, GUIDE, HELD_OUT, MAKERS, TRAIN, noise_images
from .plan import TRAINED, Plan, Run

SUMMARY = "training_summary.json"
METRICS = ("FID", "KID", "precision", "recall", "recognised")  # of which the results keep account
BATCH_SIZE = 100
COST_BATCH = 10  # images that are drawn to count operations
DATA_RECORD, RUN_RECORD = "made.json", "run.json"


def make_data(plan: Plan, name: str) -> None:
    """The data set, unless it is there."""
    folder = plan.data_folder(name)
    record = folder / DATA_RECORD
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what was interrupted
        MAKERS[name](folder, **plan.data[name])
    remember_settings(record, plan.data[name], "images")


def measure_bounds(plan: Plan, name: str) -> dict[str, Any]:
    """What images can come to at best and at worst: real ones that no model saw, and noise, as many of each as are drawn."""
    folder = plan.data_folder(name)
    held_out = DatasetImages(str(folder / HELD_OUT))
    shape = (len(held_out), *next(held_out.batches(1)).shape[1:])
    noise = plan.output_dir / "noise" / name / NPZ_NAME
    noise.parent.mkdir(parents=True, exist_ok=True)
    write_npz(noise, [noise_images(*shape[:1], shape[1:])], shape)
    bounds = {}
    for bound, source in (("real", folder / HELD_OUT), ("noise", noise)):
        figures, fingerprint = _measure(plan, name, source)
        bounds[bound] = figures | {"fingerprint": fingerprint}
    return bounds | {"number": shape[0], "commit": commit()}


def perform(plan: Plan, run: Run, num_threads: int) -> dict[str, Any]:
    """
    Train, draw and measure, or go on where that was interrupted.

    Returns:
        What the results keep: the command, figures at each of the steps at which there is a pipeline, parameters, floating-point
        operations of an image, milliseconds of a training step, seconds of sampling, hardware and commit.

    Raises:
        RuntimeError: if the training fails.
        ValueError: if the run's folder holds one with other settings.
    """
    folder = plan.folder(run)
    remember_settings(folder / RUN_RECORD, plan.settings(run), "run")
    result = {"comparison": run.comparison, "name": run.name, "seed": run.seed, "settings": plan.settings(run)}
    if run.script:
        command = run.command(folder, num_threads)
        result |= {"command": " ".join(command), "milliseconds_per_step": _train(command, folder)}
    if not run.measured:
        return result
    points = []
    for step, source in _pipelines(run, folder).items():
        started = time.perf_counter()
        images = _draw(plan, run, source, folder / "drawn" / str(step))
        seconds = time.perf_counter() - started
        figures, fingerprint = _measure(plan, run.data, images)
        points.append({"step": step, **figures})
    labels = [index % NUM_CLASSES for index in range(COST_BATCH)]
    pipeline = _load(plan, run, source, labels)
    return result | {
        "points": points,
        "fingerprint": fingerprint,  # of the last point
        "parameters": _num_parameters(pipeline),
        "gigaflops_per_image": round(gigaflops_of(lambda: _call(plan, run, pipeline, labels)) / COST_BATCH, 5),
        "sample_seconds": round(seconds, 1),  # of the last point's images
        "hardware": hardware(pipeline.device),
        "commit": commit(),
    }


def commit() -> str:
    """Of the code that runs."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _train(command: list[str], folder: Path) -> float | None:
    """Unless it is done. Returns milliseconds per step, which are no one's if nothing was left to do after an interruption."""
    summary = folder / SUMMARY
    finished = folder / "train-00000-of-00001.parquet"  # of images that are only drawn
    if not summary.exists() and not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        with open(folder / "training.log", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise RuntimeError(f"Expected the training to succeed, but got {done.returncode}; see {log.name}.")
    training = json.loads(summary.read_text()) if summary.exists() else {"steps": 0}
    return round(1000 * training["train_seconds"] / training["steps"], 1) if training["steps"] else None


def _pipelines(run: Run, folder: Path) -> dict[int, Path]:
    """By the steps that were trained for them, in all experts together."""
    if run.base:
        return {run.arguments.get("max_train_steps", 0): Path(run.base)}
    experts = sorted(folder.glob("expert_*"))
    steps = _steps((experts or [folder])[0])
    if not experts:
        return {step: folder / f"pipeline-{step}" for step in steps} or {
            run.arguments["max_train_steps"]: folder / "pipeline"
        }
    together = {}
    for step in steps:
        parts = [DiffusionPipeline.from_pretrained(expert / f"pipeline-{step}") for expert in experts]
        boundaries = json.loads((folder / "pipeline" / "model_index.json").read_text())["snr_boundaries"]
        together[step * len(experts)] = folder / f"pipeline-{step * len(experts)}"
        SNRSplitPipeline.from_pipelines(parts, boundaries).save_pretrained(together[step * len(experts)])
    return together


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("pipeline-")) for path in folder.glob("pipeline-*"))


def _draw(plan: Plan, run: Run, source: Path, folder: Path) -> Path:
    """As many images as are held out, in the classes in turn where there are any."""
    path = folder / NPZ_NAME
    if path.exists():
        return path
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
    return _draw_guided(plan, run, arguments, path) if run.guide else sample_images(arguments)


def _draw_guided(plan: Plan, run: Run, arguments: SamplingArguments, path: Path) -> Path:
    """[`sample_images`] where a classifier says what to draw."""
    source, number = Path(arguments.pipeline), arguments.num_samples
    labels = [index % NUM_CLASSES for index in range(number)]

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, number, BATCH_SIZE):
            own = labels[start : start + BATCH_SIZE]
            pipeline = _load(plan, run, source, own)
            images = _call(plan, run, pipeline, own, start)
            yield np.stack([np.asarray(image.convert("RGB")) for image in images])

    pipeline = load_to_draw(arguments.pipeline, arguments, _device())
    settings = sampling_settings(arguments, pipeline, source) | {"guidance_scale": plan.guidance_scale}
    remember_settings(path.parent / SETTINGS_NAME, settings, "images")
    size = pipeline.denoisers[0].config.sample_size
    write_npz(path, batches(), (number, size, size, 3), np.array(labels))
    return path


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _load(plan: Plan, run: Run, source: Path, labels: list[int]) -> DiffusionPipeline:
    """The pipeline that draws, guided or not."""
    settings = SamplingArguments(pipeline=str(source), scheduler=run.scheduler)
    pipeline = load_to_draw(settings.pipeline, settings, _device())
    if run.guide:
        experts = GuidanceExperts.from_pretrained(plan.folder(run) / "experts") if run.guide == TRAINED else None
        if experts is None:
            network = str(plan.data_folder(run.data) / GUIDE)
            experts = GuidanceExperts.from_base(network, method="finetune", num_experts=1)
        pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, ClassTarget(labels), plan.guidance_scale)
    return pipeline


def _call(
    plan: Plan, run: Run, pipeline: DiffusionPipeline, labels: list[int], first: int = 0
) -> list[PIL.Image.Image]:
    """Images number `first` and on."""
    conditional = (pipeline.num_classes or 1) > 1
    own = {"class_labels": labels, "guidance_scale": 1.0} if conditional else {"batch_size": len(labels)}
    indices = range(first, first + len(labels))
    return draw(pipeline, run.seed, indices, num_inference_steps=plan.num_inference_steps, **own)


def _measure(plan: Plan, data: str, source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of an `.npz` file or a folder, against the images that were trained on, and their fingerprint."""
    folder = plan.data_folder(data)
    arguments = EvaluationArguments(
        generated=str(source),
        reference=str(folder / TRAIN),
        extractor=str(folder / EXTRACTOR),
        output=str(plan.output_dir / "evaluations" / data / f"{'-'.join(source.parts[-4:-1])}.json"),
    )
    results = evaluate(arguments)
    figures = {result["metric"]: result["value"] for result in results if result["metric"] in METRICS}
    if data == "digits":
        figures["recognised"] = _recognised(source)
    return figures, results[0]["settings"]


def _recognised(source: Path) -> float | None:
    """The share of the digits that another kind of model than the networks takes for what they are to be."""
    images = open_images(source)
    labels = images.labels if isinstance(images, NpzImages) else np.array(images.dataset["label"])
    if labels is None:
        return None
    pixels = np.concatenate([batch[..., 0] for batch in images.batches(BATCH_SIZE)])
    found = fit_reader().predict(pixels.reshape(len(pixels), -1) / 255)
    return round(float((found == labels).mean()), 4)


def _num_parameters(pipeline: DiffusionPipeline) -> int:
    """Of all that draws."""
    parts = [
        *pipeline.denoisers,
        getattr(pipeline, "prompt_patch", None),
        getattr(pipeline.scheduler, "experts", None),
    ]
    return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())
