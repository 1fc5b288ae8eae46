"""Images that a diffusion model itself generates, for networks to learn from without other data."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import PIL.Image
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..arguments import option
from .seeded_sampling import SeededSamplingArguments, load_sampling_pipeline, sample_seeded
from .shards import make_shard_accelerator, remember_settings, write_shards

IMAGE, TEACHER_IMAGE = "image", "teacher_image"  # the columns
SETTINGS_NAME = "generation.json"


@dataclass(kw_only=True)
class GenerationArguments(SeededSamplingArguments):
    """How the images are generated, and where they are written."""

    super_resolution_pipeline: str | None = option(
        None,
        "A pipeline that enlarges the first one's images, for the teacher of a low-resolution student.",
    )
    output_dir: str = option("outputs/guidance_data", "Where the parquet shards are written.")
    num_images: int = option(500_000, "Number of images.")
    scheduler: str = option(
        "DDIMScheduler",
        "The scheduler to sample with, such as DDIM or DDIMScheduler, in the pipelines' settings; empty for the pipelines' own.",
    )
    pipeline_arguments: str = option(
        "{}", 'Further arguments of the pipelines\' calls, as JSON; for example {"prompt": ""}.'
    )

    number_field: ClassVar[str] = "num_images"


def generate_images(args: GenerationArguments) -> None:
    """
    Write parquet shards of generated images (see [`write_shards`]).

    The images are in the column `image`; with a super-resolution pipeline the same ones, enlarged, in `teacher_image`.

    Args:
        args ([`GenerationArguments`]): Everything that can be set.

    Raises:
        ValueError: if `output_dir` holds images that were generated with other settings.
    """
    accelerator = make_shard_accelerator()
    with accelerator.main_process_first():
        _check_settings(args)
    stages = (
        [args.pipeline] if args.super_resolution_pipeline is None else [args.pipeline, args.super_resolution_pipeline]
    )
    pipelines = [load_sampling_pipeline(name, args, accelerator.device) for name in stages]

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        columns: dict[str, list[PIL.Image.Image]] = {name: [] for name in (IMAGE, TEACHER_IMAGE)[: len(pipelines)]}
        for start in range(0, len(rows), args.batch_size):
            indices = rows[start : start + args.batch_size]
            columns[IMAGE] += _generate(pipelines[0], args, indices)
            if len(pipelines) == 2:
                columns[TEACHER_IMAGE] += _generate(pipelines[1], args, indices, columns[IMAGE][-len(indices) :])
            progress.update(len(indices))
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features(dict.fromkeys(columns, datasets.Image()))
        )

    write_shards(accelerator, args.output_dir, args.num_images, args.shard_size, make_shard, "Generating")
    accelerator.end_training()


def _generate(
    pipeline: DiffusionPipeline, args: GenerationArguments, indices: range, small: list[PIL.Image.Image] | None = None
) -> list[PIL.Image.Image]:
    """One image for each index; with `small` images, those enlarged."""
    arguments: dict[str, Any] = json.loads(args.pipeline_arguments)
    if "prompt" in arguments:
        arguments["prompt"] = [arguments["prompt"]] * len(indices)
    elif small is None:
        arguments["batch_size"] = len(indices)
    if small is not None:
        arguments["image"] = small
    return sample_seeded(pipeline, args.seed, indices, num_inference_steps=args.num_inference_steps, **arguments)


def _check_settings(args: GenerationArguments) -> None:
    """Record the settings that the images depend on, or compare them with those recorded."""
    free = ("output_dir", "batch_size")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    remember_settings(Path(args.output_dir, SETTINGS_NAME), settings, "images")
