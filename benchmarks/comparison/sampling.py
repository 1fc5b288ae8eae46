"""The images of a run, sampled by its pipeline.

Legend: N images, H and W height and width.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from diffusers import DiffusionPipeline

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler
from diffusers_dmp.evaluation.fashion import CLASSES
from diffusers_dmp.evaluation.npz import write_npz
from diffusers_dmp.evaluation.sample import (
    NPZ_NAME,
    SETTINGS_NAME,
    SamplingArguments,
    sample_images,
    sampling_settings,
)
from diffusers_dmp.guidance.bundle import WEIGHTS_NAME
from diffusers_dmp.models.inputs import has_classes
from diffusers_dmp.saving.whole import write_json
from diffusers_dmp.training.data.prompts import prompts_of, read_prompts
from diffusers_dmp.training.data.seeded_sampling import load_sampling_pipeline, sample_seeded
from diffusers_dmp.training.data.shards import remember_settings

from .data import device
from .plan import Plan, Run
from .text import PROMPTS, attach_loras, is_of_text, loras_of, write_labels

BATCH_SIZE = 250
NUM_CLASSES = len(CLASSES)
SCALE = "scale"  # of a guide, in `Run.sampling`

RECORD = "sampled.json"  # beside the images: how long they took


def sample(plan: Plan, run: Run, source: Path, folder: Path) -> tuple[Path, float]:
    """
    Sample the images that are measured, unless they are in `folder`.

    Args:
        plan ([`Plan`]), run ([`Run`]): What is sampled.
        source (`Path`): The folder of the pipeline.
        folder (`Path`): Where the images are written.

    Returns:
        The `.npz` file, and how many milliseconds an image took.
    """
    path, record = folder / NPZ_NAME, folder / RECORD
    if record.exists():
        return path, json.loads(record.read_text())["milliseconds_per_image"]
    arguments = SamplingArguments(
        pipeline=str(source), output_dir=str(folder), num_images=plan.num_images, seed=run.seed, **_settings(plan, run)
    )
    started = time.perf_counter()
    if run.guide:
        _sample_guided(plan, run, arguments, path)
    else:
        sample_images(arguments)
    if is_of_text(run):
        write_labels(path, NUM_CLASSES)
    milliseconds = round(1000 * (time.perf_counter() - started) / arguments.num_images, 2)
    write_json(record, {"milliseconds_per_image": milliseconds})
    return path, milliseconds


def _settings(plan: Plan, run: Run) -> dict[str, Any]:
    """Return the fields of [`SamplingArguments`] that decide how an image is sampled."""
    own = {name: plan.resolve(run, value) for name, value in run.sampling.items() if name != SCALE}
    plans = {"num_inference_steps": plan.num_inference_steps, "guidance_scale": 1.0, "batch_size": BATCH_SIZE}
    loras = loras_of(plan, run)
    return plans | own | ({} if loras is None else {"lora_experts": str(loras)})


def _sample_guided(plan: Plan, run: Run, arguments: SamplingArguments, path: Path) -> None:
    """Sample with a classifier's guidance towards each class in turn, otherwise as [`sample_images`] does."""
    number = arguments.num_images
    labels = [index % NUM_CLASSES for index in range(number)]
    pipeline, experts = load_sampling_pipeline(arguments.pipeline, arguments, device()), _experts(plan, run)
    settings = sampling_settings(arguments, pipeline, Path(arguments.pipeline))
    remember_settings(path.parent / SETTINGS_NAME, settings | {"guidance_scale": run.sampling[SCALE]}, "images")
    scheduler = pipeline.scheduler

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, number, BATCH_SIZE):
            own = labels[start : start + BATCH_SIZE]
            pipeline.scheduler = GuidedScheduler(scheduler, experts, ClassTarget(own), run.sampling[SCALE])
            images = call(plan, run, pipeline, own, start)
            yield np.stack([np.asarray(image.convert("RGB")) for image in images])

    size = pipeline.denoisers[0].config.sample_size
    write_npz(path, batches(), (number, size, size, 3), np.array(labels))


def _experts(plan: Plan, run: Run) -> GuidanceExperts:
    """Load the experts that guide, or a classifier as one expert for all noise levels."""
    folder = plan.place(run, run.guide)
    if (folder / WEIGHTS_NAME).exists():
        return GuidanceExperts.from_pretrained(folder).to(device())
    return GuidanceExperts.from_base(str(folder), method="finetune", num_experts=1).to(device())


def load_pipeline(plan: Plan, run: Run, source: Path, labels: list[int]) -> DiffusionPipeline:
    """
    Load a run's pipeline, with its guidance or its LoRAs if it has any.

    Args:
        plan ([`Plan`]), run ([`Run`]): What is loaded.
        source (`Path`): The folder of the pipeline.
        labels (`list[int]`): The classes that a classifier guides the images to.
    """
    arguments = SamplingArguments(pipeline=str(source), **_settings(plan, run))
    pipeline = attach_loras(load_sampling_pipeline(arguments.pipeline, arguments, device()), loras_of(plan, run))
    if run.guide:
        target = ClassTarget(labels)
        pipeline.scheduler = GuidedScheduler(pipeline.scheduler, _experts(plan, run), target, run.sampling[SCALE])
    return pipeline


def call(
    plan: Plan, run: Run, pipeline: DiffusionPipeline, labels: list[int], first: int = 0
) -> list[PIL.Image.Image]:
    """
    Sample one batch.

    Args:
        plan ([`Plan`]), run ([`Run`]): What is sampled.
        pipeline: As [`load_pipeline`] returned it.
        labels (`list[int]`): The images' classes, which a pipeline without classes ignores.
        first (`int`): Index of the first image, which decides its random numbers together with the run's seed.
    """
    own: dict[str, Any] = {"batch_size": len(labels)}
    if is_of_text(run):
        settings = _settings(plan, run)
        prompts = prompts_of(labels, read_prompts(settings[PROMPTS]))
        own = {"prompt": prompts, "guidance_scale": settings["guidance_scale"]}
    elif has_classes(pipeline.num_classes):
        own = {"class_labels": labels, "guidance_scale": 1.0}
    indices = range(first, first + len(labels))
    return sample_seeded(pipeline, run.seed, indices, num_inference_steps=plan.num_inference_steps, **own)


def num_parameters(pipeline: DiffusionPipeline) -> int:
    """Count the parameters of everything that samples: denoisers with their LoRAs, prompts and guidance."""
    parts = [
        *(pipeline.denoisers if hasattr(pipeline, "denoisers") else [pipeline.transformer]),
        getattr(pipeline, "prompt_patch", None),
        getattr(pipeline.scheduler, "experts", None),
    ]
    return sum(parameter.numel() for part in parts if part is not None for parameter in part.parameters())
