from .dit import DIT_PRESETS, DiTModel
from .dtr_transformer_2d import DTRTransformer2DModel, TaskRouting

__all__ = ["DIT_PRESETS", "DTRTransformer2DModel", "DiTModel", "TaskRouting"]
