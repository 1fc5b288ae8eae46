"""Images that a diffusion model itself generates, for networks to learn from without other data."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ...diffusion.noise import is_flow_matching
from ...models.precision import check_dtype, dtype_named
from ..arguments import option
from .encoded_images import EncodedImages
from .prompts import PROMPT, prompts_sha256, read_prompts
from .random_numbers import noise_settings
from .requests import CallArguments, Requests, make_requests
from .seeded_sampling import SeededSamplingArguments, compile_for_sampling, load_sampling_pipeline, sample_seeded
from .shards import make_shard_accelerator, remember_settings, write_shards

IMAGE, TEACHER_IMAGE = "image", "teacher_image"  # the columns
SETTINGS_NAME = "generation.json"
DEFAULT_SCHEDULER = "DDIMScheduler"  # the paper's


@dataclass(kw_only=True)
class GenerationArguments(CallArguments, SeededSamplingArguments):
    """How the images are generated, and where they are written."""

    super_resolution_pipeline: str | None = option(
        None,
        "A pipeline that enlarges the first one's images, for the teacher of a low-resolution student.",
    )
    output_dir: str = option("outputs/guidance_data", "Where the parquet shards are written.")
    num_images: int = option(500_000, "Number of images.")
    scheduler: str | None = option(  # type: ignore[assignment]
        None,
        "The scheduler to sample with, such as DDIM or DDIMScheduler, in the pipelines' settings; empty for the pipelines' own. By "
        "default DDIM, and for flow matching the pipelines' own.",
    )
    pipeline_arguments: str = option(
        "{}",
        'Further arguments of the pipelines\' calls, as JSON; for example {"negative_prompt": "blurry"}, or {"prompt": ""} for all '
        "images.",
    )

    number_field: ClassVar[str] = "num_images"

    def __post_init__(self):
        super().__post_init__()
        self.check_call()
        if self.prompts is not None and PROMPT in self.further_arguments():
            raise ValueError(
                f"Expected either `prompts` or the `{PROMPT}` of `pipeline_arguments`, but got {self.prompts!r} and "
                f"{self.further_arguments()[PROMPT]!r}."
            )

    def scheduler_for(self, pipeline: DiffusionPipeline) -> str:
        """See [`SeededSamplingArguments`]."""
        if self.scheduler is None:
            return "" if is_flow_matching(pipeline.scheduler) else DEFAULT_SCHEDULER
        return self.scheduler

    def read_prompts(self) -> list[str] | None:
        """The prompts that the images have in turn; None for a pipeline without."""
        if self.prompts is not None:
            return read_prompts(self.prompts, self.prompt_column)
        prompt = self.further_arguments().get(PROMPT)
        return None if prompt is None else [prompt]


def generate_images(args: GenerationArguments) -> None:
    """
    Write parquet shards of generated images (see [`write_shards`]).

    The images are in the column `image`; with a super-resolution pipeline the same ones, enlarged, in `teacher_image`. Image i
    has the prompt i modulo the number of prompts; of a pipeline of classes the images are those without. Of a pipeline of
    videos, the first frame is the image.

    Args:
        args ([`GenerationArguments`]): Everything that can be set.

    Raises:
        ValueError: if `output_dir` holds images that were generated with other settings, the pipelines' calls and the
            arguments do not fit, or the device does not have the dtype.
    """
    prompts = args.read_prompts()
    accelerator = make_shard_accelerator()
    check_dtype(dtype_named(args.dtype), accelerator.device)  # before anything is downloaded
    stages = (
        [args.pipeline] if args.super_resolution_pipeline is None else [args.pipeline, args.super_resolution_pipeline]
    )
    pipelines = [load_sampling_pipeline(name, args, accelerator.device) for name in stages]
    requests = [_make_requests(pipeline, args, prompts, stage) for stage, pipeline in enumerate(pipelines)]
    compiled = [compile_for_sampling(pipeline) for pipeline in pipelines] if args.compile else []
    if any(compiled):
        accelerator.print("Compiling: the first batch takes a minute or so longer.")
    with accelerator.main_process_first():
        settings = _settings(args, pipelines[0], prompts)
        remember_settings(Path(args.output_dir, SETTINGS_NAME), settings, "images")

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        with EncodedImages() as small, EncodedImages() as large:
            for start in range(0, len(rows), args.batch_size):
                indices = rows[start : start + args.batch_size]
                images = sample_seeded(pipelines[0], args.seed, indices, **requests[0](indices))
                small.add(images)
                if len(pipelines) == 2:
                    arguments = requests[1](indices) | {"image": images}
                    arguments.pop("batch_size", None)  # that of the images
                    large.add(sample_seeded(pipelines[1], args.seed, indices, **arguments))
                progress.update(len(indices))
            columns = dict(zip((IMAGE, TEACHER_IMAGE)[: len(pipelines)], (small.encoded(), large.encoded())))
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features(dict.fromkeys(columns, datasets.Image()))
        )

    write_shards(accelerator, args.output_dir, args.num_images, args.shard_size, make_shard, "Generating")
    accelerator.end_training()


def _make_requests(
    pipeline: DiffusionPipeline, args: GenerationArguments, prompts: list[str] | None, stage: int
) -> Requests:
    """What the pipeline of a stage is called with; the second one enlarges the images of the first, and knows its own size."""
    given = args.given("guidance_scale", *[("height", "width"), ()][stage]) | args.further_arguments()
    given.pop(PROMPT, None)
    if stage == 1 and PROMPT not in inspect.signature(pipeline.__call__).parameters:
        prompts = None  # it enlarges by the images alone
    return make_requests(pipeline, prompts, given, classes_in_turn=False, num_inference_steps=args.num_inference_steps)


def _settings(args: GenerationArguments, pipeline: DiffusionPipeline, prompts: list[str] | None) -> dict[str, Any]:
    """The settings that the images depend on."""
    free = ("output_dir", "batch_size", "compile", "prompt_column")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["scheduler"] = args.scheduler_for(pipeline)
    settings |= noise_settings(pipeline.device)
    if args.prompts is not None and prompts is not None:
        settings |= {"prompts": Path(args.prompts).name, "prompts_sha256": prompts_sha256(prompts)}
    return settings
