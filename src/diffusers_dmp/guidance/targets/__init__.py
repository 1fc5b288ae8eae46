"""What guidance asks for: log p(y | x), from the output of a vision network.

A class, a depth map, a segmentation, a prompt, a high score, several of them at once, or one for each frame of a video. To ask for
something else, derive from [`GuidanceTarget`].
"""

from .base import GuidanceTarget
from .classes import ClassTarget
from .combined import FrameTargets, WeightedTargets
from .maps import DepthTarget, SegmentationTarget
from .score import ScoreTarget
from .text import TextTarget

__all__ = [
    "ClassTarget",
    "DepthTarget",
    "FrameTargets",
    "GuidanceTarget",
    "ScoreTarget",
    "SegmentationTarget",
    "TextTarget",
    "WeightedTargets",
]
