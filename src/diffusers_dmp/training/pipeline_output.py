"""The pipeline of a trained model, and samples that it generates during the training."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from torch import nn

from ..pipelines import ClassConditionalPipeline
from ..saving.whole import written_whole
from .arguments import LoopArguments
from .data.loop_data import LoopData
from .loop import TrainingParts
from .resources import explained_disk_errors

CONFIGURATIONS = "pipeline_config"  # the folder in `output_dir`
NUM_ROWS, MAX_COLUMNS = 4, 10  # of the grid of samples


def trained_pipeline(parts: TrainingParts, data: LoopData, model: nn.Module) -> Any:
    """
    The pipeline of a model with its present weights.

    Args:
        parts ([`TrainingParts`]), data ([`LoopData`]): Of the training.
        model (`nn.Module`): One of `parts`: `whole_model()` to save the pipeline, `plain_model` to generate with it in every
            process, `described_model` for its configuration.
    """
    if parts.recipe.make_pipeline is not None:
        return parts.recipe.make_pipeline(model)
    scheduler = parts.plain_objective.scheduler
    label_names = getattr(data, "label_names", None)
    names = None if label_names is None else {str(label): name for label, name in enumerate(label_names)}
    return ClassConditionalPipeline(
        scheduler=type(scheduler).from_config(scheduler.config),  # a copy: sampling sets its timesteps
        vae=parts.vae,
        id2label=names,
        **parts.recipe.components(model),
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


def save_samples(parts: TrainingParts, pipeline: Any, args: LoopArguments, step: int) -> None:
    """Write a grid of samples to `samples/step-<step>.png` and to the trackers; sharded weights want it called everywhere."""
    accelerator = parts.accelerator
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator(accelerator.device).manual_seed(args.seed)
    generate = parts.recipe.generate or partial(_generate_classes, args.sample_inference_steps)
    with parts.precision():
        rows = generate(pipeline, generator)
    if not accelerator.is_main_process:
        return
    path = Path(args.output_dir, "samples", f"step-{step}.png")
    grid = make_image_grid([image for row in rows for image in row], len(rows), len(rows[0]))
    with explained_disk_errors(path), written_whole(path) as unfinished:
        grid.save(unfinished, format="png")
    pixels = np.asarray(grid.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": pixels}, step=step, **layout)


def _generate_classes(
    num_inference_steps: int, pipeline: ClassConditionalPipeline, generator: torch.Generator
) -> list[list[PIL.Image.Image]]:
    """Four rows of samples, with up to ten classes in columns; ten columns without classes."""
    columns = min(pipeline.num_classes or MAX_COLUMNS, MAX_COLUMNS)
    labels = None if pipeline.num_classes is None else list(range(columns)) * NUM_ROWS
    output: Any = pipeline(
        class_labels=labels,
        batch_size=NUM_ROWS * columns,
        num_inference_steps=num_inference_steps,
        generator=generator,
    )
    return [output.images[row * columns :][:columns] for row in range(NUM_ROWS)]
