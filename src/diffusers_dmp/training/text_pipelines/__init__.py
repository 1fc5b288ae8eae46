"""What each family of Diffusers' text-to-image pipelines needs to be trained: how prompts are encoded and denoisers called."""

from .base import TextPipeline
from .registry import register_conditions, text_pipeline_of
