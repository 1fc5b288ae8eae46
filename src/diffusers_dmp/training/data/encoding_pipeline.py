"""Pipelines of which only text encoders and VAE are loaded, to encode captions and images."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...saving.finite import expect_finite_pipeline
from ...saving.pipeline_parts import load_components, saved_class
from ..text_pipelines import TextPipeline, text_pipeline_of
from ..text_pipelines.index import read_pipeline_index

ENCODERS = ("vae", "text_encoder", "tokenizer", "scheduler")  # how the names of the components that are loaded begin


def load_encoding_pipeline(name_or_path: str, dtype: torch.dtype) -> DiffusionPipeline:
    """
    Load a text-to-image pipeline without its denoiser and what else encoding does not need.

    Args:
        name_or_path (`str`): Its folder or Hub id.
        dtype (`torch.dtype`): Of its text encoders; the VAE is loaded in float32.

    Raises:
        ValueError: if its family is not known (see [`register_conditions`]), a file of a local folder is damaged, or weights are not
            finite.
    """
    config = read_pipeline_index("pipeline", name_or_path)
    pipeline_class = saved_class(config)
    if pipeline_class is None:
        raise ValueError(
            f"Expected `pipeline` to be of a class of Diffusers, but got {config['_class_name']!r}; in Python, load it yourself, "
            "`register_conditions(…)` for its class, and call `encode_prompts(args, pipeline)`."
        )
    text_pipeline = text_pipeline_of(pipeline_class)
    wanted = (*ENCODERS, *text_pipeline.text_components)
    dtypes = {"default": dtype, "vae": torch.float32}
    pipeline = load_components(name_or_path, lambda name: name.startswith(wanted), dtype=dtypes)
    expect_finite_pipeline(pipeline, name_or_path)
    return pipeline


def check_vae(pipeline: Any, text_pipeline: TextPipeline, resolution: int) -> int:
    """
    Check that a pipeline's VAE encodes images of this resolution.

    Args:
        pipeline ([`DiffusionPipeline`]): The pipeline.
        text_pipeline ([`TextPipeline`]): Of its family.
        resolution (`int`): Height and width of square images, in pixels.

    Returns:
        `int`: The number of pixels by which height and width of images have to be divisible.

    Raises:
        ValueError: if it has no VAE, which its family needs, or images of that size cannot be encoded.
    """
    if text_pipeline.needs_vae and getattr(pipeline, "vae", None) is None:
        raise ValueError(f"Expected `pipeline` to have a VAE, but got a {type(pipeline).__name__} without one.")
    multiple = text_pipeline.size_multiple(pipeline)
    if resolution % multiple:
        below = resolution // multiple * multiple
        raise ValueError(
            f"Expected `resolution` to be divisible by the {multiple} pixels of this pipeline's latents and patches, such as "
            f"{below or multiple}, but got {resolution}."
        )
    return multiple
