"""Diffusion models whose parts are specialised by noise level, for Diffusers.

Importing this package registers its classes, so that `DiffusionPipeline.from_pretrained` finds them. The classes themselves are
imported when they are first used.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from .hub.registration import register
from .saving.moved import MOVED, answer_old_imports
from .saving.version import __version__

_MODELS = ["DTRTransformer2DModel", "DenoiserExperts", "DiTModel", "PatchedUNet2DModel", "RemixDiTModel"]
_PIPELINES = ["ClassConditionalPipeline", "SNRSplitPipeline", "SentenceToImagePipeline"]
_IMPORT_STRUCTURE = {
    "conversion": ["convert_checkpoint", "load_original_state_dict", "to_diffusers_experts"],
    "guidance": [
        "ClassTarget",
        "DepthTarget",
        "FrameTargets",
        "GuidanceExperts",
        "GuidanceTarget",
        "GuidedScheduler",
        "LatentDecoder",
        "ScoreTarget",
        "SegmentationTarget",
        "TextTarget",
        "VideoDecoder",
        "WeightedTargets",
        "decoder_of",
        "register_decoder",
    ],
    "hub": ["publish"],
    "intervals": ["NoiseIntervals"],
    "models": [*_MODELS, "TimeArgument", "register_time_argument"],
    "plugins": [
        "Conditioning",
        "LoraExperts",
        "PromptPatch",
        "Stream",
        "TaskRouting",
        "TransformerLayout",
        "blocks_with_streams",
        "observe_streams",
        "register_layout",
        "register_streams",
    ],
    "pipelines": [*_PIPELINES, "experts_per_step", "respaced_timesteps", "steps_per_expert"],
}
_MODULE_OF = {name: module for module, names in _IMPORT_STRUCTURE.items() for name in names}

if TYPE_CHECKING:
    from .conversion import *
    from .guidance import *
    from .hub.publishing import publish
    from .intervals import NoiseIntervals
    from .models import *
    from .pipelines import *
    from .plugins import *
else:
    __all__ = [*_IMPORT_STRUCTURE, *_MODULE_OF]

    def __getattr__(name: str):
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
            globals()[name] = value
            return value
        if name in _IMPORT_STRUCTURE or name in MOVED:  # `diffusers_dmp.patches` too, until 0.4
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    register(sys.modules[__name__], [*_MODELS, "PromptPatch", *_PIPELINES])
    answer_old_imports()
