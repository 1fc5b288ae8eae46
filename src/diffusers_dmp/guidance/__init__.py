"""Guidance by a vision model (PPAP): experts, targets, and the guided scheduler."""

from .decoders import LatentDecoder, PackedLatentDecoder, VideoDecoder
from .experts import GuidanceExperts
from .guided_scheduler import GuidedScheduler
from .pipeline_decoders import decoder_of, register_decoder
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
    "LatentDecoder",
    "PackedLatentDecoder",
    "ScoreTarget",
    "SegmentationTarget",
    "TextTarget",
    "VideoDecoder",
    "WeightedTargets",
    "decoder_of",
    "register_decoder",
]
