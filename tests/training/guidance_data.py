"""Images that a tiny pipeline generates for guidance experts, shared by several test modules."""

from pathlib import Path

from accelerate.state import AcceleratorState
from conftest import TINY_CONFIG, randomised
from datasets import Dataset, load_dataset
from diffusers import DDPMScheduler

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.training.data.generation import GenerationArguments, generate_images


def save_unconditional(folder: Path) -> Path:
    """Save a pipeline of grey images of 8 pixels, without classes."""
    transformer = randomised(
        DiTModel(**TINY_CONFIG | {"in_channels": 1, "out_channels": 1, "num_classes": 1, "class_dropout_prob": 0.0})
    )
    ClassConditionalPipeline(transformer, DDPMScheduler()).save_pretrained(folder)
    return folder


def generate(pipeline: Path, output_dir: Path, **arguments) -> Dataset:
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults = {"num_images": 10, "batch_size": 4, "shard_size": 6, "num_inference_steps": 2}
    generate_images(GenerationArguments(pipeline=str(pipeline), output_dir=str(output_dir), **defaults | arguments))
    return load_dataset(str(output_dir), split="train")
