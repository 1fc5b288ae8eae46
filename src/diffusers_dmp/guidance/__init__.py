"""Guidance by a vision model (PPAP): experts, targets, and the guided scheduler."""

from .decoders import LatentDecoder, PackedLatentDecoder, VideoDecoder
from .experts import GuidanceExperts
from .guided_scheduler import GuidedScheduler
from .pipeline_decoders import decoder_of, register_decoder
from .targets import ClassTarget, DepthTarget, GuidanceTarget, SegmentationTarget, WeightedTargets

__all__ = [
    "ClassTarget",
    "DepthTarget",
    "GuidanceExperts",
    "GuidanceTarget",
    "GuidedScheduler",
    "LatentDecoder",
    "PackedLatentDecoder",
    "SegmentationTarget",
    "VideoDecoder",
    "WeightedTargets",
    "decoder_of",
    "register_decoder",
]
