"""Images that depend on a seed and an index alone, not on the batch size or the number of processes.

That holds on one kind of device, and up to rounding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...diffusion.noise import is_flow_matching
from ...diffusion.noise_schedules import clips, ends_in_pure_noise
from ...diffusion.scheduler_names import scheduler_class
from ...diffusion.schedulers import make_like
from ...models.precision import check_dtype, dtype_named
from ...saving.finite import expect_finite_pipeline
from ...saving.naming import descends_from
from ...saving.weight_files import check_saved_folder
from ..arguments import option
from ..compilation import check_compiler
from .random_numbers import own_random_numbers

DENOISERS = ("transformer", "transformer_2", "unet")  # of Diffusers' pipelines

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class SeededSamplingArguments:
    """How images are generated. A subclass has a field for their number, and names it in `number_field`."""

    pipeline: str = option("", "Folder or Hub id of the pipeline that generates the images.")
    batch_size: int = option(100, "Images that are generated at once; guidance doubles the batch that the model sees.")
    shard_size: int = option(1000, "Images per file; an interrupted run keeps its complete files.")
    seed: int = option(0, "An image depends on this and its index alone.")
    num_inference_steps: int = option(25, "Denoising steps.")
    scheduler: str = option(
        "",
        "The scheduler to sample with, such as DDIM or DDIMScheduler, in the pipeline's settings; empty for the pipeline's own.",
    )
    dtype: str = option("float32", "Precision of the pipeline: float32, float16 or bfloat16.")
    compile: bool = option(False, "Compile the denoisers; the first batch takes longer.")

    number_field: ClassVar[str]

    def __post_init__(self):
        for name in (self.number_field, "batch_size", "shard_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {getattr(self, name)}.")
        if not self.pipeline:
            raise ValueError("Expected `pipeline` to be a folder or Hub id, but got nothing.")
        if self.scheduler:
            self.scheduler = scheduler_class(self.scheduler)
        if self.seed < 0:
            raise ValueError(f"Expected `seed` to be at least 0, but got {self.seed}.")
        dtype_named(self.dtype)  # raises for an unknown one

    def scheduler_for(self, pipeline: DiffusionPipeline) -> str:
        """The class of the scheduler that a pipeline samples with; empty for its own."""
        return self.scheduler


def load_sampling_pipeline(
    name_or_path: str, args: SeededSamplingArguments, device: torch.device
) -> DiffusionPipeline:
    """
    Load a pipeline that returns its images unchanged (without watermark or safety checker), and shows no progress.

    Args:
        name_or_path (`str`): A folder or Hub id.
        args ([`SeededSamplingArguments`]): For its dtype and scheduler.
        device (`torch.device`): The device to move it to.

    Raises:
        ValueError: if a file of a local folder is damaged, weights are not finite, also in this dtype, or the scheduler is of
            another noise process than the pipeline's own; or if the device has no such dtype.
    """
    dtype = dtype_named(args.dtype)
    check_dtype(dtype, device)
    check_saved_folder(name_or_path)
    pipeline = DiffusionPipeline.from_pretrained(name_or_path, dtype=dtype).to(device)
    expect_finite_pipeline(pipeline, name_or_path)
    class_name = args.scheduler_for(pipeline)
    if class_name:
        pipeline.scheduler = _scheduler_for(pipeline, class_name)
    for name in ("watermarker", "safety_checker"):  # they would change images that are only learned from or measured
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compile_for_sampling(pipeline: DiffusionPipeline) -> bool:
    """
    Compile a pipeline's denoisers: as it does itself, or else their repeated blocks. Where neither is possible, a log line says why.

    Args:
        pipeline: After everything is attached to its denoisers.

    Returns:
        `bool`: Whether they are. It happens when the first batch is sampled.
    """
    if hasattr(pipeline, "compile"):
        pipeline.compile()
        return True
    denoisers: list[Any] = [getattr(pipeline, name, None) for name in DENOISERS]
    found = [denoiser for denoiser in denoisers if getattr(denoiser, "_repeated_blocks", None)]
    if not found:
        logger.warning(
            "The %s is not compiled: neither it nor its denoiser's class says how (`compile`, `_repeated_blocks`).",
            type(pipeline).__name__,
        )
        return False
    try:
        check_compiler(pipeline.device)
    except ValueError as error:
        logger.warning("The %s is not compiled. %s", type(pipeline).__name__, error)
        return False
    for denoiser in found:
        denoiser.compile_repeated_blocks()
    return True


def _scheduler_for(pipeline: DiffusionPipeline, class_name: str) -> SchedulerMixin:
    """
    Make a scheduler of a class for a pipeline.

    This package's pipelines choose where a solver begins. Diffusers' own begin where the scheduler does, which with a cosine
    schedule may be in pure noise: with `timestep_spacing="leading"` it is before that.
    """
    scheduler = make_like(pipeline.scheduler, class_name)
    if is_flow_matching(scheduler) != is_flow_matching(pipeline.scheduler):
        raise ValueError(
            f"Expected `scheduler` to be of the noise process of the {type(pipeline).__name__}'s own, a "
            f"{type(pipeline.scheduler).__name__}, but got a {class_name}: only one of them is for flow matching."
        )
    chooses = any(descends_from(pipeline, name) for name in ("ClassConditionalPipeline", "SNRSplitPipeline"))
    if chooses or is_flow_matching(scheduler) or clips(scheduler) or not ends_in_pure_noise(scheduler):
        return scheduler
    return make_like(pipeline.scheduler, class_name, timestep_spacing="leading")


def sample_seeded(
    pipeline: DiffusionPipeline, seed: int, indices: Sequence[int], **arguments: Any
) -> list[PIL.Image.Image]:
    """
    Generate one image for each index; of a pipeline of videos, the first frame of each.

    Args:
        pipeline: A pipeline that accepts a list of generators.
        seed (`int`): Seeds an image's generator, together with the image's index.
        indices (`Sequence[int]`): The indices of the images.
        arguments: Further arguments of the pipeline's call.

    Raises:
        ValueError: if the pipeline also takes random numbers from PyTorch's global generator, and there are several images.
    """
    states = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64).item() for index in indices]
    device = pipeline.device  # a property that takes a pipeline a millisecond to compute
    generators = [torch.Generator(device).manual_seed(state) for state in states]
    with own_random_numbers(pipeline, generators, states[0]):
        output = pipeline(**arguments, generator=generators)
    return [frames[0] for frames in output.frames] if hasattr(output, "frames") else output.images
