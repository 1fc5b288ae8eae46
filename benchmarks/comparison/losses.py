"""The loss of a run's pipeline by noise level, on real images that were not trained on."""

from diffusers import DiffusionPipeline

from diffusers_dmp.evaluation.diagnostics import band_losses
from diffusers_dmp.training.data.images import load_images

from .data import REFERENCE
from .measure import read_images
from .plan import Plan, Run
from .text import is_of_text, text_losses

NUM_BANDS = 8
NUM_IMAGES = 500


def measure_losses(plan: Plan, run: Run, pipeline: DiffusionPipeline) -> list[float]:
    """
    Measure the mean squared error of the predicted noise, or of the velocity of a text-to-image model, in bands of timesteps of
    equal length, the least noise first.

    Args:
        plan ([`Plan`]), run ([`Run`]): For the data set.
        pipeline: The run's.
    """
    folder = plan.data_folder(run.data) / REFERENCE
    if is_of_text(run):
        images, labels = read_images(folder)
        losses = text_losses(pipeline, images[:NUM_IMAGES, ..., 0], labels[:NUM_IMAGES], NUM_BANDS)
    else:
        losses = band_losses(pipeline, load_images(str(folder)), NUM_IMAGES, NUM_BANDS)
    return [round(loss, 6) for loss in losses]
