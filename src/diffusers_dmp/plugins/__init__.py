"""What attaches to a denoiser, and comes off again without a trace: prompts (DMP)."""

from .blocks import Conditioning, TransformerLayout, register_layout
from .prompts import PromptPatch

__all__ = ["Conditioning", "PromptPatch", "TransformerLayout", "register_layout"]
