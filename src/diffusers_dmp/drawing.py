"""Images that a seed and an index decide alone, however many are drawn at a time, and by how many processes."""

from collections.abc import Sequence

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

DTYPES = ("float32", "float16", "bfloat16")


def load_to_draw(
    name_or_path: str, device: torch.device, dtype: str = "float32", scheduler: str | None = None
) -> DiffusionPipeline:
    """
    A pipeline that draws images as they are, without a progress of its own.

    Args:
        name_or_path (`str`): A folder or Hub id.
        device (`torch.device`): Where to.
        dtype (`str`): One of 'float32', 'float16' and 'bfloat16'.
        scheduler (`str`, *optional*): The class of Diffusers to draw with, in the pipeline's settings; its own by default.
    """
    pipeline = DiffusionPipeline.from_pretrained(name_or_path, dtype=getattr(torch, dtype)).to(device)
    if scheduler:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
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
    generators = [torch.Generator(pipeline.device).manual_seed(state) for state in states]
    return pipeline(**arguments, generator=generators).images
