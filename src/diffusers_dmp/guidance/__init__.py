"""Guidance by a vision model (PPAP): experts, targets, and the guided scheduler."""

from .experts import GuidanceExperts
from .guided_scheduler import GuidedScheduler
from .targets import ClassTarget, DepthTarget, GuidanceTarget, SegmentationTarget, WeightedTargets

__all__ = [
    "ClassTarget",
    "DepthTarget",
    "GuidanceExperts",
    "GuidanceTarget",
    "GuidedScheduler",
    "SegmentationTarget",
    "WeightedTargets",
]
