"""The plain DiT, which DTR and Remix-DiT extend: model, layers, published sizes, conversion from and to Diffusers' own DiT."""

from .configuration import DIT_PRESETS, DIT_SIZES
from .model import DiTModel

__all__ = ["DIT_PRESETS", "DIT_SIZES", "DiTModel"]
