from .pipeline_class_conditional import ClassConditionalPipeline
from .respacing import respaced_timesteps

__all__ = ["ClassConditionalPipeline", "respaced_timesteps"]
