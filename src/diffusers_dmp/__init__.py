"""Diffusion models whose parts are specialised by noise level, for Diffusers.

Importing this package registers its classes, so that `DiffusionPipeline.from_pretrained` finds them.
"""

from .conversion import convert_checkpoint, load_original_state_dict, to_diffusers_experts
from .guidance import (
    ClassTarget,
    DepthTarget,
    GuidanceExperts,
    GuidanceTarget,
    GuidedScheduler,
    SegmentationTarget,
    WeightedTargets,
)
from .intervals import NoiseIntervals
from .models import DiTModel, DTRTransformer2DModel, PatchedUNet2DModel, RemixDiTModel
from .patches import Conditioning, PromptPatch, TransformerLayout, register_layout
from .pipelines import ClassConditionalPipeline, SNRSplitPipeline, respaced_timesteps
from .registration import register

__version__ = "0.1.0"
__all__ = [
    "ClassConditionalPipeline",
    "ClassTarget",
    "Conditioning",
    "DTRTransformer2DModel",
    "DepthTarget",
    "DiTModel",
    "GuidanceExperts",
    "GuidanceTarget",
    "GuidedScheduler",
    "NoiseIntervals",
    "PatchedUNet2DModel",
    "PromptPatch",
    "RemixDiTModel",
    "SNRSplitPipeline",
    "SegmentationTarget",
    "TransformerLayout",
    "WeightedTargets",
    "convert_checkpoint",
    "load_original_state_dict",
    "register_layout",
    "respaced_timesteps",
    "to_diffusers_experts",
]

register(
    DiTModel,
    DTRTransformer2DModel,
    RemixDiTModel,
    PatchedUNet2DModel,
    PromptPatch,
    ClassConditionalPipeline,
    SNRSplitPipeline,
)
