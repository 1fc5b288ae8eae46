"""What attaches to a denoiser, and comes off again without a trace: a LoRA per interval, prompts (DMP)."""

from .blocks import Conditioning, TransformerLayout, register_layout
from .lora_experts import LoraExperts
from .prompts import PromptPatch

__all__ = ["Conditioning", "LoraExperts", "PromptPatch", "TransformerLayout", "register_layout"]
