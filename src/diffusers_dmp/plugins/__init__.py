"""What attaches to a denoiser, and comes off again without a trace: prompts (DMP)."""

from .blocks import register_layout
from .layouts import Conditioning, TransformerLayout
from .prompts import PromptPatch
from .streams import Block, Stream, blocks_with_streams, observe_streams, register_streams

__all__ = [
    "Block",
    "Conditioning",
    "PromptPatch",
    "Stream",
    "TransformerLayout",
    "blocks_with_streams",
    "observe_streams",
    "register_layout",
    "register_streams",
]
