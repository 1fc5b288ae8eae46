"""Tiny text-to-image trainings: pipelines with text encoders, images and captions that they have encoded, and runs on them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate.state import AcceleratorState, PartialState
from tiny_pipelines import RECIPES
from tiny_text import with_text

from diffusers_dmp.training.data.prompt_encoding import PromptEncodingArguments, encode_prompts
from diffusers_dmp.training.text_to_image import TextToImageArguments, train_text_to_image

SIZES = {"zimage": 32, "qwen": 32, "wan": 16}  # of images in pixels; 8 elsewhere
NUM_IMAGES = 8

TINY_TEXT = {
    "batch_size": 4,
    "max_train_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "checkpointing_steps": 2,
    "report_to": "none",
}


def fresh_processes() -> None:
    """Let Accelerate begin again, as for another process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@dataclasses.dataclass(frozen=True)
class EncodedPipeline:
    """
    Args:
        name: The pipeline's name in `RECIPES`.
        pipeline: The folder of the pipeline, with text encoders.
        shards: The folder of what it has encoded.
    """

    name: str
    pipeline: Path
    shards: Path

    def arguments(self, output_dir: Path, **arguments: Any) -> dict[str, Any]:
        """The arguments of a training, as strings and numbers."""
        paths = {"pretrained_model_name_or_path": str(self.pipeline), "dataset": str(self.shards)}
        return TINY_TEXT | paths | {"output_dir": str(output_dir)} | arguments

    def train(self, output_dir: Path, **arguments: Any) -> Path:
        """A training in this process."""
        fresh_processes()
        train_text_to_image(TextToImageArguments(**self.arguments(output_dir, **arguments)))
        return output_dir


def encode_pipeline(name: str, folder: Path, pipe: Any = None) -> EncodedPipeline:
    """Save a tiny pipeline, by default that of `RECIPES`, and let it encode a few images and captions."""
    images, pipeline, shards = folder / "images", folder / "pipeline", folder / "shards"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    size = SIZES.get(name, 8)
    for number in range(NUM_IMAGES):
        # bright on the left or at the top, so that there is something to learn
        ramp = np.linspace(60, 255, size)[None if number % 2 else slice(None)].reshape(
            (1, -1) if number % 2 else (-1, 1)
        )
        pixels = np.clip(ramp[..., None] * np.array([1.0, 0.7, 0.4]) + generator.normal(0, 8, (size, size, 3)), 0, 255)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"bright {'left' if number % 2 else 'top'}, number {number}")
    with_text(name, pipe or RECIPES[name].pipe(RECIPES[name].denoiser())).save_pretrained(pipeline)
    fresh_processes()
    encode_prompts(
        PromptEncodingArguments(
            dataset=str(images), pipeline=str(pipeline), resolution=size, mirror=True, output_dir=str(shards)
        )
    )
    fresh_processes()
    return EncodedPipeline(name, pipeline, shards)
