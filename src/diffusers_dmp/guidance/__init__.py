"""Guidance by a vision model (PPAP): experts, targets, and the guided scheduler."""

from .experts import GuidanceExperts
from .guided_scheduler import GuidedScheduler
from .targets import (
    ClassTarget,
    DepthTarget,
    FrameTargets,
    GuidanceTarget,
    ScoreTarget,
    SegmentationTarget,
    TextTarget,
    WeightedTargets,
)

__all__ = [
    "ClassTarget",
    "DepthTarget",
    "FrameTargets",
    "GuidanceExperts",
    "GuidanceTarget",
    "GuidedScheduler",
    "ScoreTarget",
    "SegmentationTarget",
    "TextTarget",
    "WeightedTargets",
]
