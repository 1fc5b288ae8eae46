from .dit import DIT_PRESETS, DiTModel
from .dtr_transformer_2d import DTRTransformer2DModel, TaskRouting
from .remix_dit import REMIX_DIT_PRESETS, RemixDiTModel

__all__ = ["DIT_PRESETS", "REMIX_DIT_PRESETS", "DTRTransformer2DModel", "DiTModel", "RemixDiTModel", "TaskRouting"]
