"""The loss of a run's pipeline by noise level, on real images that were not trained on."""

from diffusers import DiffusionPipeline

from diffusers_dmp.evaluation.diagnostics import band_losses
from diffusers_dmp.training.data.images import load_images

from .data import REFERENCE
from .plan import Plan, Run

NUM_BANDS = 8
NUM_IMAGES = 500


def measure_losses(plan: Plan, run: Run, pipeline: DiffusionPipeline) -> list[float]:
    """
    Measure the mean squared error of the predicted noise in bands of timesteps of equal length, the least noise first.

    Args:
        plan ([`Plan`]), run ([`Run`]): For the data set.
        pipeline: The run's.
    """
    images = load_images(str(plan.data_folder(run.data) / REFERENCE))
    return [round(loss, 6) for loss in band_losses(pipeline, images, NUM_IMAGES, NUM_BANDS)]
