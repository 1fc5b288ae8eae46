"""What attaches to a denoiser, and comes off again without a trace: a LoRA per interval, prompts (DMP), routing (DTR)."""

from .blocks import Conditioning, TransformerLayout, register_layout
from .lora_experts import LoraExperts
from .prompts import PromptPatch
from .streams import Block, Stream, blocks_with_streams, observe_streams, register_streams
from .task_routing import TaskRouting

__all__ = [
    "Block",
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
]
