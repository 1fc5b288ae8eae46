"""What attaches to a denoiser, and comes off again without a trace: prompts (DMP), routing of channels (DTR)."""

from .blocks import register_layout
from .layouts import Conditioning, TransformerLayout
from .prompts import PromptPatch
from .streams import Block, Stream, blocks_with_streams, observe_streams, register_streams
from .task_routing import TaskRouting

__all__ = [
    "Block",
    "Conditioning",
    "PromptPatch",
    "Stream",
    "TaskRouting",
    "TransformerLayout",
    "blocks_with_streams",
    "observe_streams",
    "register_layout",
    "register_streams",
]
