"""Conversion of published checkpoints to this library's models.

DiT (`dit`), DTR (`dtr`), Remix-DiT (`remix`) and DMP (`dmp`): see `dit.py`; Patch Diffusion: `patch_diffusion.py`; ADM:
`adm.py`; PPAP: `ppap.py`. What the shapes of the weights show need not be given: width, depth, patch size, channels,
classes, learned variance, image size, bases, experts, prompts.
"""

import argparse
import os
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file

from ..guidance import GuidanceExperts
from .adm import build_adm_unet, load_adm_unet
from .dit import build_dit, build_dmp, build_dtr, build_remix, load_dit
from .patch_diffusion import build_patched_unet, load_patched_unet
from .ppap import convert_ppap

# for each system: what makes a model of the weights' shapes, and what loads the weights
_CONVERSIONS: dict[str, tuple[Callable[..., ModelMixin], Callable[..., None]]] = {
    "dit": (build_dit, load_dit),
    "dtr": (build_dtr, load_dit),
    "remix": (build_remix, load_dit),
    "dmp": (build_dmp, load_dit),
    "patch_diffusion": (build_patched_unet, load_patched_unet),
    "adm": (build_adm_unet, load_adm_unet),
}


def convert_checkpoint(
    system: str,
    state_dict: "dict[str, torch.Tensor] | Sequence[dict[str, torch.Tensor]]",
    config: dict[str, Any] | None = None,
) -> "ModelMixin | GuidanceExperts":
    """
    Turn the state dict of a published implementation into this library's model.

    Args:
        system (`str`): 'dit', 'dtr', 'remix', 'dmp', 'patch_diffusion', 'adm' or 'ppap'.
        state_dict (`dict[str, torch.Tensor]`): The weights under the original's names ([`load_original_state_dict`] reads
            them from a file); for 'ppap' a list of them, one for each expert.
        config (`dict`, *optional*): Arguments of the original's constructor under their own names: `num_heads` (needed for
            a width of no published size), `num_classes`, `class_dropout_prob`, `learn_sigma`, …, and for DTR
            `sharing_ratio`, `alpha`, `taskcount` and `init_method`, for DMP `vp_type`, `topk` and `uncond`, for Patch
            Diffusion and ADM `image_size`, `num_head_channels`, …. Arguments that contradict the weights are refused.

    Returns:
        [`DiTModel`], [`DTRTransformer2DModel`], [`RemixDiTModel`], [`PatchedUNet2DModel`] or, for 'adm', Diffusers'
        [`UNet2DModel`], in eval mode and float32; for 'ppap' [`GuidanceExperts`]. For 'dmp' a [`DiTModel`] with prompts
        attached, which `PromptPatch.attached_to(model)` returns.

    Raises:
        ValueError: if `system` or an argument in `config` is unknown, `num_heads` is needed, or a weight is missing,
            unknown or of another shape than `config` says (the first such weight is named).
    """
    systems = [*_CONVERSIONS, "ppap"]
    if system not in systems:
        raise ValueError(f"Expected `system` to be one of {', '.join(systems)}, but got {system!r}.")
    if isinstance(state_dict, dict) == (system == "ppap"):
        wanted = "a list of state dicts" if system == "ppap" else "one state dict"
        raise ValueError(
            f"Expected `state_dict` to be {wanted} for {system!r}, but got a {type(state_dict).__name__}."
        )
    config = dict(config or {})
    if not isinstance(state_dict, dict):
        experts = convert_ppap(state_dict, config)
        _check_all_used(config, system)
        return experts
    build, load = _CONVERSIONS[system]
    weights = {key: tensor.float() for key, tensor in state_dict.items()}
    model = build(weights, config)
    _check_all_used(config, system)
    load(model, weights)
    return model.eval()


def _check_all_used(config: dict[str, Any], system: str) -> None:
    if config:
        raise ValueError(
            f"Expected `config` to hold arguments of the original {system!r} model, but got {list(config)}."
        )


def load_original_state_dict(path: "str | os.PathLike", use_ema: bool = True) -> dict[str, torch.Tensor]:
    """
    Read a published `.pt` file, without executing code in it, or a `.safetensors` file.

    Args:
        path (`str` or `os.PathLike`): The file: a training checkpoint with the entries `model` and `ema`, or weights only.
        use_ema (`bool`): Whether to take the averaged weights from a training checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: The weights under the original's names.

    Raises:
        ValueError: if the file holds no state dict.
    """
    if str(path).endswith(".safetensors"):
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments are saved in the same file
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"Expected {str(path)!r} to hold tensors and nothing that runs, but got another file."
            ) from error
    for entry in ("ema", "model") if use_ema else ("model",):
        if entry in checkpoint:
            checkpoint = checkpoint[entry]
            break
    if not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint.values()):
        raise ValueError(f"Expected `path` to hold a state dict, but got the entries {list(checkpoint)} in {path}.")
    return {key.removeprefix("module."): tensor for key, tensor in checkpoint.items()}
