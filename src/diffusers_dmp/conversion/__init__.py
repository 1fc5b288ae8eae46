"""Conversion of published checkpoints to this library's models, and export of stock Diffusers weights."""

from .experts import to_diffusers_experts
from .original import convert_checkpoint, load_original_state_dict

__all__ = ["convert_checkpoint", "load_original_state_dict", "to_diffusers_experts"]
