"""Samples from validation prompts, which the pipeline itself generates while the denoiser is trained."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from ..text_pipelines.base import Columns
from .source import SourcePipeline

if TYPE_CHECKING:
    from .arguments import TextToImageArguments


class PromptSamples:
    """
    Generates one image for each validation prompt: the same noise for the same prompt, every time.

    The prompts are encoded when this is made; the text encoders are not kept.

    Args:
        source ([`SourcePipeline`]): The pipeline, with its VAE.
        args ([`TextToImageArguments`]): For the prompts, steps, size and guidance.

    Raises:
        ValueError: if the pipeline cannot generate images of that size.
    """

    def __init__(self, source: SourcePipeline, args: "TextToImageArguments"):
        self.args = args
        self._check_size(source)
        encoder = source.encoding_pipeline()
        self.prompts = [source.family.encode_prompts(encoder, [prompt]) for prompt in args.validation_prompts]
        self.empty = source.family.encode_prompts(encoder, [""])

    def _check_size(self, source: SourcePipeline) -> None:
        """Pipelines refuse other sizes, or round them: after the first steps, that would be too late."""
        if source.pipeline.vae is None:
            return
        multiple = source.family.size_multiple(source.pipeline)
        for name in ("sample_height", "sample_width"):
            size = getattr(self.args, name)
            if size is not None and (size < 1 or size % multiple):
                raise ValueError(
                    f"Expected `{name}` to be divisible by the {multiple} pixels of this pipeline's latents and patches, but got {size}."
                )

    def __call__(self, pipeline: Any, generator: torch.Generator) -> list[list[PIL.Image.Image]]:
        """One row of images; see [`TrainingRecipe.generate`]."""
        device, seed = generator.device, generator.initial_seed()
        row = []
        for index, prompt in enumerate(self.prompts):
            arguments = embeddings_as_arguments(pipeline, prompt, self.empty, device) | self._settings(pipeline)
            own_generator = torch.Generator(device).manual_seed(seed + index)
            output = pipeline(
                generator=own_generator, num_inference_steps=self.args.sample_inference_steps, **arguments
            )
            row.append(_first_image(output[0]))
        # the denoiser is trained at exact timesteps, not at those of the sampling
        pipeline.register_modules(scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config))
        return [row]

    def _settings(self, pipeline: Any) -> dict[str, Any]:
        """What the arguments, and the kind of the pipeline, decide about a call."""
        args = self.args
        given = {
            "height": args.sample_height,
            "width": args.sample_width,
            "guidance_scale": args.sample_guidance_scale,
            "num_frames": 1,  # of a video
            "output_type": "pil",
        }
        if args.sample_height or args.sample_width:
            given["use_resolution_binning"] = False  # PixArt generates other sizes otherwise
        known = call_parameters(pipeline)
        return {name: value for name, value in given.items() if value is not None and name in known}


def embeddings_as_arguments(pipeline: Any, prompt: Columns, empty: Columns, device: torch.device) -> dict[str, Any]:
    """
    The arguments of a pipeline's call for a prompt that is encoded, and for the empty one as the negative prompt.

    Args:
        pipeline ([`DiffusionPipeline`]): The pipeline, of which the arguments are read: `prompt_embeds` and the like.
        prompt, empty (`dict`): As [`TextPipeline.encode_prompts`] returns them, for one prompt each.
        device (`torch.device`): Where they are needed.
    """
    known = call_parameters(pipeline)
    arguments: dict[str, Any] = {"negative_prompt": None} if "negative_prompt" in known else {}
    takes_lists = "prompt_embeds_mask" not in known  # of prompts without padding, which others take with a mask
    for prefix, columns in (("", prompt), ("negative_", empty)):
        for name, column in columns.items():
            if f"{prefix}{name}" not in known:
                continue
            if isinstance(column, torch.Tensor):
                arguments[f"{prefix}{name}"] = column.to(device)
            else:
                moved = [each.to(device) for each in column]
                arguments[f"{prefix}{name}"] = moved if takes_lists else torch.stack(moved)
    return arguments


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline's call."""
    return inspect.signature(type(pipeline).__call__).parameters


def _first_image(images: Sequence[Any]) -> PIL.Image.Image:
    """The image of one prompt; of a video the first frame."""
    first = images[0]
    return first[0] if isinstance(first, (list, tuple)) else first
