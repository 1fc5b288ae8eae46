"""Denoisers with `from_pretrained`: DiT, DTR, Remix-DiT, the patchified UNet of Patch Diffusion, and several denoisers as one."""

from ..saving.moved import old_names
from .channel_routing import ChannelRouting
from .denoiser_experts import DenoiserExperts
from .dit.model import DIT_PRESETS, DiTModel
from .dtr_transformer_2d import DTRTransformer2DModel
from .patched_unet_2d import PatchedUNet2DModel
from .remix_dit import REMIX_DIT_PRESETS, RemixDiTModel
from .time_argument import TimeArgument, register_time_argument, time_argument_of

__all__ = [
    "DIT_PRESETS",
    "REMIX_DIT_PRESETS",
    "ChannelRouting",
    "DTRTransformer2DModel",
    "DenoiserExperts",
    "DiTModel",
    "PatchedUNet2DModel",
    "RemixDiTModel",
    "TimeArgument",
    "register_time_argument",
    "time_argument_of",
]

__getattr__ = old_names(__name__)
