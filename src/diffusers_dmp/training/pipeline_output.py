"""The pipeline of a trained model, and samples that it generates during the training."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from ..pipelines import ClassConditionalPipeline
from ..saving.whole import written_whole
from .arguments import SharedTrainingArguments
from .data.training_data import TrainingData
from .loop import TrainingParts
from .resources import explained_disk_errors

CONFIGURATIONS = "pipeline_config"  # the folder in `output_dir`
NUM_ROWS, MAX_COLUMNS = 4, 10  # of the grid of samples


def trained_pipeline(parts: TrainingParts, data: TrainingData) -> ClassConditionalPipeline:
    """The pipeline of a model with its present weights."""
    scheduler = parts.plain_objective.scheduler
    names = None if data.label_names is None else {str(label): name for label, name in enumerate(data.label_names)}
    return ClassConditionalPipeline(
        scheduler=type(scheduler).from_config(scheduler.config),  # a copy: sampling sets its timesteps
        vae=parts.vae,
        id2label=names,
        **parts.recipe.components(parts.plain_model),
    )


def save_whole(pipeline: DiffusionPipeline, path: Path) -> None:
    """Save a pipeline; the folder gets its name when it is complete, and replaces what an earlier run left there."""
    with explained_disk_errors(path), written_whole(path) as unfinished:
        pipeline.save_pretrained(unfinished)


def save_configurations(pipeline: ClassConditionalPipeline, output_dir: "str | os.PathLike") -> None:
    """Write what saving a pipeline writes but the weights, so that one can be made of any checkpoint beside it."""
    with written_whole(Path(output_dir, CONFIGURATIONS)) as unfinished:
        pipeline.save_config(unfinished)
        for name, component in pipeline.components.items():
            if component is not None:
                component.save_config(unfinished / name)


def save_samples(
    accelerator: Accelerator, pipeline: ClassConditionalPipeline, args: SharedTrainingArguments, step: int
) -> None:
    """
    Write a grid of samples to `samples/step-<step>.png` and to the trackers.

    The grid has four rows, and up to ten classes in columns; ten columns without classes.
    """
    pipeline.set_progress_bar_config(disable=True)
    columns = min(pipeline.num_classes or MAX_COLUMNS, MAX_COLUMNS)
    labels = None if pipeline.num_classes is None else list(range(columns)) * NUM_ROWS
    output: Any = pipeline(
        class_labels=labels,
        batch_size=NUM_ROWS * columns,
        num_inference_steps=args.sample_inference_steps,
        generator=torch.Generator(accelerator.device).manual_seed(args.seed),
    )
    path = Path(args.output_dir, "samples", f"step-{step}.png")
    grid = make_image_grid(output.images, NUM_ROWS, columns)
    with explained_disk_errors(path), written_whole(path) as unfinished:
        grid.save(unfinished, format="png")
    pixels = np.asarray(grid.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": pixels}, step=step, **layout)
