"""Images that a diffusion model itself makes, for networks to learn from without anybody's data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import PIL.Image
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..arguments import option
from .seeded_sampling import DrawingArguments, draw, load_to_draw
from .shards import make_shard_accelerator, remember_settings, write_shards

IMAGE, TEACHER_IMAGE = "image", "teacher_image"  # the columns
SETTINGS_NAME = "generation.json"


@dataclass(kw_only=True)
class GenerationArguments(DrawingArguments):
    super_resolution_pipeline: str | None = option(
        None, "One that enlarges what the first draws: the teacher of a low-resolution student looks at its images."
    )
    output_dir: str = option("outputs/guidance_data", "Where the parquet shards are written.")
    num_images: int = option(500_000, "How many.")
    scheduler: str = option(
        "DDIMScheduler", "Diffusers' scheduler to draw with, in the pipelines' settings; empty for their own."
    )
    pipeline_arguments: str = option("{}", 'Further arguments of the pipelines\' calls, as JSON: {"prompt": ""}, say.')

    number_field: ClassVar[str] = "num_images"


def generate_images(args: GenerationArguments) -> None:
    """
    Write parquet shards of images (see [`write_shards`]) in the column `image`, and with a super-resolution pipeline the same
    ones enlarged in `teacher_image`.

    Raises:
        ValueError: if `output_dir` holds images that were made otherwise.
    """
    accelerator = make_shard_accelerator()
    with accelerator.main_process_first():
        _check_settings(args)
    stages = (
        [args.pipeline] if args.super_resolution_pipeline is None else [args.pipeline, args.super_resolution_pipeline]
    )
    pipelines = [load_to_draw(name, args, accelerator.device) for name in stages]

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        columns = {name: [] for name in (IMAGE, TEACHER_IMAGE)[: len(pipelines)]}
        for start in range(0, len(rows), args.batch_size):
            indices = rows[start : start + args.batch_size]
            columns[IMAGE] += _draw(pipelines[0], args, indices)
            if len(pipelines) == 2:
                columns[TEACHER_IMAGE] += _draw(pipelines[1], args, indices, columns[IMAGE][-len(indices) :])
            progress.update(len(indices))
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features(dict.fromkeys(columns, datasets.Image()))
        )

    write_shards(accelerator, args.output_dir, args.num_images, args.shard_size, make_shard, "Drawing")
    accelerator.end_training()


def _draw(
    pipeline: DiffusionPipeline, args: GenerationArguments, indices: range, small: list[PIL.Image.Image] | None = None
) -> list[PIL.Image.Image]:
    """One image for each index, of a generator of its own; with `small` ones, those enlarged."""
    arguments = json.loads(args.pipeline_arguments)
    if "prompt" in arguments:
        arguments["prompt"] = [arguments["prompt"]] * len(indices)
    elif small is None:
        arguments["batch_size"] = len(indices)
    if small is not None:
        arguments["image"] = small
    return draw(pipeline, args.seed, indices, num_inference_steps=args.num_inference_steps, **arguments)


def _check_settings(args: GenerationArguments) -> None:
    """Of what decides the images, and so not how many are drawn at a time."""
    free = ("output_dir", "batch_size")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    remember_settings(Path(args.output_dir, SETTINGS_NAME), settings, "images")
