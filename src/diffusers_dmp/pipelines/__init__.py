"""Pipelines that generate images with one class-conditional denoiser, or with several in turn."""

from .expert_steps import experts_per_step, steps_per_expert
from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_snr_split import SNRSplitPipeline
from .respacing import respaced_timesteps

__all__ = [
    "ClassConditionalPipeline",
    "SNRSplitPipeline",
    "experts_per_step",
    "respaced_timesteps",
    "steps_per_expert",
]
