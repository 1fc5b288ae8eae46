"""The plain DiT, which DTR and Remix-DiT extend: model, layers, published sizes, conversion from and to Diffusers' own DiT."""

from ...saving.moved import old_names
from .configuration import DIT_PRESETS, DIT_SIZES
from .model import DiTModel

__all__ = ["DIT_PRESETS", "DIT_SIZES", "DiTModel"]

__getattr__ = old_names(__name__)  # of the module that had this package's name
