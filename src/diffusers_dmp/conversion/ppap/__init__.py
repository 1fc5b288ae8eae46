"""Conversion of PPAP's published experts (https://github.com/riiid/PPAP): torchvision's ResNets, timm's DeiT and MiDaS small."""

from .convert import convert_ppap
from .published import peft_factors

__all__ = ["convert_ppap", "peft_factors"]
