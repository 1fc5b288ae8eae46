"""Diffusion models whose parts are specialised by noise level, for Diffusers.

Importing this package registers its classes, so that `DiffusionPipeline.from_pretrained` finds them. They themselves are
imported when they are first used.
"""

import sys
from typing import TYPE_CHECKING

from diffusers.utils import _LazyModule

from .hub.registration import register
from .saving.version import __version__

_MODELS = ["DTRTransformer2DModel", "DiTModel", "PatchedUNet2DModel", "RemixDiTModel"]
_PIPELINES = ["ClassConditionalPipeline", "SNRSplitPipeline"]
_IMPORT_STRUCTURE = {
    "conversion": ["convert_checkpoint", "load_original_state_dict", "to_diffusers_experts"],
    "guidance": [
        "ClassTarget",
        "DepthTarget",
        "GuidanceExperts",
        "GuidanceTarget",
        "GuidedScheduler",
        "SegmentationTarget",
        "WeightedTargets",
    ],
    "hub": ["publish"],
    "intervals": ["NoiseIntervals"],
    "models": _MODELS,
    "plugins": ["Conditioning", "PromptPatch", "TransformerLayout", "register_layout"],
    "pipelines": [*_PIPELINES, "respaced_timesteps"],
}

if TYPE_CHECKING:
    from .conversion import *
    from .guidance import *
    from .hub.publishing import publish
    from .intervals import NoiseIntervals
    from .models import *
    from .pipelines import *
    from .plugins import *
else:
    sys.modules[__name__] = _LazyModule(
        __name__, __file__, _IMPORT_STRUCTURE, module_spec=__spec__, extra_objects={"__version__": __version__}
    )
    sys.modules[__name__].__doc__ = __doc__
    register(sys.modules[__name__], [*_MODELS, "PromptPatch", *_PIPELINES])
