"""Pipelines of which only text encoders and VAE are loaded, to encode captions and images."""

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ...saving.finite import expect_finite_pipeline
from ...saving.mixins import is_component
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
    pipeline_class = _pipeline_class(config["_class_name"])
    text_pipeline = text_pipeline_of(pipeline_class)
    left_out: dict[str, Any] = {
        name: None
        for name, entry in config.items()
        if is_component(entry) and not name.startswith((*ENCODERS, *text_pipeline.text_components))
    }
    if "requires_safety_checker" in config:  # without it, Diffusers would warn that no safety checker is loaded
        left_out["requires_safety_checker"] = False
    dtypes = {"default": dtype, "vae": torch.float32}
    # by its own class: of `DiffusionPipeline`, those that are optional (Wan's transformers) are loaded all the same
    pipeline = pipeline_class.from_pretrained(name_or_path, dtype=dtypes, **left_out)
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


def _pipeline_class(name: "str | list[str]") -> Any:
    """The class that a saved pipeline names."""
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None:
        raise ValueError(
            f"Expected `pipeline` to be of a class of Diffusers, but got {name!r}; in Python, load it yourself, "
            "`register_conditions(…)` for its class, and call `encode_prompts(args, pipeline)`."
        )
    return pipeline_class
