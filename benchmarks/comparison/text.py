"""The runs of a text-to-image model: how it is loaded with its LoRAs, called with prompts, and its loss by noise level.

Legend: N images.
"""

from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

from diffusers_dmp import LoraExperts, NoiseIntervals
from diffusers_dmp.evaluation.denoiser_diagnostics import losses_between
from diffusers_dmp.evaluation.digits import DIGIT_PHRASES, DIGITS
from diffusers_dmp.evaluation.fashion import captions_of
from diffusers_dmp.evaluation.judge import as_pixels
from diffusers_dmp.evaluation.npz import NpzImages, write_npz

from .plan import Plan, Run

LORAS = "loras"  # the folder in a run's that has trained any
PROMPTS = "prompts"  # in `Run.sampling`: the file of prompts, one for each class


def is_of_text(run: Run) -> bool:
    """Return whether a run's pipeline is called with prompts."""
    return PROMPTS in run.sampling


def loras_of(plan: Plan, run: Run) -> Path | None:
    """Return the folder of the LoRAs that a run has trained; None if it has trained none."""
    folder = plan.folder(run) / LORAS
    return folder if folder.is_dir() else None


def attach_loras(pipeline: DiffusionPipeline, folder: Path | None) -> DiffusionPipeline:
    """Attach LoRAs to a pipeline, each to its noise levels, and return the pipeline."""
    if folder is not None:
        LoraExperts.from_pretrained(folder).attach(pipeline)
    return pipeline


def write_labels(path: Path, num_classes: int) -> None:
    """Add its classes to an `.npz` file of images that were sampled from the prompts of all classes in turn."""
    images = NpzImages(path)
    batches = list(images.batches(1000))
    shape = (len(images), *batches[0].shape[1:])
    write_npz(path, batches, shape, np.arange(len(images)) % num_classes)


def text_losses(pipeline: DiffusionPipeline, images: np.ndarray, labels: np.ndarray, num_bands: int) -> list[float]:
    """
    Measure the loss of a pipeline with all its LoRAs by noise level: everywhere that of the LoRA that acts there.

    Args:
        pipeline: As [`attach_loras`] returned it.
        images (`np.ndarray` of shape (N, H, W)), labels (`np.ndarray` of shape (N,)): Digits.
        num_bands (`int`): K.

    Returns:
        `list[float]` of length K: The mean squared error of the predicted velocity in bands of equally many timesteps.
    """
    prompt_embeds, pooled = pipeline.encode_prompt(captions_of(labels, DIGITS, DIGIT_PHRASES))
    inputs = {"encoder_hidden_states": prompt_embeds, "pooled_projections": pooled}
    samples = [(as_pixels(images).to(pipeline.device), inputs)]
    edges = NoiseIntervals.uniform(num_bands, pipeline.scheduler.config.num_train_timesteps).edges
    return losses_between(pipeline.transformer, samples, pipeline.scheduler, edges)
