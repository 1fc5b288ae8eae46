"""Images that a seed and an index decide alone, however many are drawn at a time, and by how many processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from ...diffusion.schedulers import SCHEDULERS, make_like
from ..arguments import option

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(kw_only=True)
class DrawingArguments:
    """What decides how images are drawn; how many of them a subclass says, in the field that it names."""

    pipeline: str = option("", "Folder or Hub id of the pipeline that draws.")
    batch_size: int = option(100, "How many at a time; a null class doubles what the model sees.")
    shard_size: int = option(1000, "How many to a file, of which a run that goes on keeps the whole ones.")
    seed: int = option(0, "With an image's index it decides the image alone.")
    num_inference_steps: int = option(25, "Denoising steps.")
    scheduler: str = option("", "Diffusers' scheduler to draw with, in the pipeline's settings; empty for its own.")
    dtype: str = option("float32", "Of the pipeline: float32, float16 or bfloat16.")

    number_field: ClassVar[str]

    def __post_init__(self):
        for name in (self.number_field, "batch_size", "shard_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {getattr(self, name)}.")
        if not self.pipeline:
            raise ValueError("Expected `pipeline` to be a folder or Hub id, but got nothing.")
        if self.scheduler and self.scheduler not in SCHEDULERS.values():
            raise ValueError(
                f"Expected `scheduler` to be one of {', '.join(SCHEDULERS.values())}, but got {self.scheduler!r}."
            )
        if self.seed < 0:
            raise ValueError(f"Expected `seed` to be at least 0, but got {self.seed}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Expected `dtype` to be one of {', '.join(DTYPES)}, but got {self.dtype!r}.")


def load_to_draw(name_or_path: str, args: DrawingArguments, device: torch.device) -> DiffusionPipeline:
    """
    A pipeline that draws images as they are, without a progress of its own.

    Args:
        name_or_path (`str`): A folder or Hub id.
        args ([`DrawingArguments`]): For its dtype and scheduler.
        device (`torch.device`): Where to.
    """
    pipeline = DiffusionPipeline.from_pretrained(name_or_path, dtype=getattr(torch, args.dtype)).to(device)
    if args.scheduler:
        pipeline.scheduler = make_like(pipeline.scheduler, args.scheduler)
    for name in (
        "watermarker",
        "safety_checker",
    ):  # they would draw into images that are only learned from or measured
        if getattr(pipeline, name, None) is not None:
            setattr(pipeline, name, None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline, seed: int, indices: Sequence[int], **arguments) -> list[PIL.Image.Image]:
    """
    One image for each index.

    Args:
        pipeline: Any that takes a list of generators.
        seed (`int`): With an image's index, what its generator is seeded by.
        indices (of `int`): The images' own.
        arguments: Others of the pipeline's call.
    """
    states = [np.random.SeedSequence([seed, index]).generate_state(1, np.uint64).item() for index in indices]
    device = pipeline.device  # which a pipeline takes a millisecond to find out
    generators = [torch.Generator(device).manual_seed(state) for state in states]
    return pipeline(**arguments, generator=generators).images
