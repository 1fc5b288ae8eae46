from .experts import to_diffusers_experts
from .original import convert_checkpoint, load_original_state_dict

__all__ = ["convert_checkpoint", "load_original_state_dict", "to_diffusers_experts"]
