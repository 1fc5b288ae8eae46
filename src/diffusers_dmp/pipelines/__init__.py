"""Pipelines that generate images with one class-conditional denoiser, or with several in turn."""

from .pipeline_class_conditional import ClassConditionalPipeline
from .pipeline_snr_split import SNRSplitPipeline
from .respacing import respaced_timesteps

__all__ = ["ClassConditionalPipeline", "SNRSplitPipeline", "respaced_timesteps"]
