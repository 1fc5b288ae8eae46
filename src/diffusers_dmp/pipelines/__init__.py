"""Pipelines that generate images: with one class-conditional denoiser, with several in turn, or from sentences."""

from .expert_steps import experts_per_step, steps_per_expert
from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_sentence_to_image import SentenceToImagePipeline
from .pipeline_snr_split import SNRSplitPipeline
from .respacing import respaced_timesteps

__all__ = [
    "ClassConditionalPipeline",
    "SNRSplitPipeline",
    "SentenceToImagePipeline",
    "experts_per_step",
    "respaced_timesteps",
    "steps_per_expert",
]
