"""Conversion of published checkpoints to this library's models.

DiT (`dit`), DTR (`dtr`), Remix-DiT (`remix`) and DMP (`dmp`): see `dit.py`; Patch Diffusion: `patch_diffusion.py`; ADM:
`adm.py`; PPAP: `ppap/`. What the shapes of the weights show need not be given: width, depth, patch size, channels,
classes, learned variance, image size, bases, experts, prompts.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..guidance import GuidanceExperts
from ..saving.finite import expect_finite_weights
from ..saving.weight_files import read_weights
from .adm import build_adm_unet, load_adm_unet
from .dit import build_dit, build_dmp, build_dtr, build_remix, load_dit
from .patch_diffusion import build_patched_unet, load_patched_unet
from .ppap import convert_ppap
from .renaming import in_float32
from .state_dicts import state_dict_in

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
    network: nn.Module | None = None,
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
        network (`nn.Module`, *optional*): For 'ppap' the network that the experts were made of, where the checkpoints do not
            define it: MiDaS small, `torch.hub.load("intel-isl/MiDaS", "MiDaS_small")`. It is changed in place.

    Returns:
        [`DiTModel`], [`DTRTransformer2DModel`], [`RemixDiTModel`], [`PatchedUNet2DModel`] or, for 'adm', Diffusers'
        [`UNet2DModel`], in eval mode and float32; for 'ppap' [`GuidanceExperts`]. For 'dmp' a [`DiTModel`] with prompts
        attached, which `PromptPatch.attached_to(model)` returns.

    Raises:
        ValueError: if `system` or an argument in `config` is unknown, `num_heads` or `network` is needed, or a weight is missing,
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
    if network is not None and system != "ppap":
        raise ValueError(f"Expected `network` for 'ppap' alone, but got one for {system!r}.")
    config = dict(config or {})
    try:
        if not isinstance(state_dict, dict):
            experts = convert_ppap(state_dict, config, network)
            _check_all_used(config, system)
            return experts
        build, load = _CONVERSIONS[system]
        weights = in_float32(state_dict)
        model = build(weights, config)
        _check_all_used(config, system)
        load(model, weights)
    except (IndexError, KeyError, RuntimeError) as error:  # one is missing, or has too few dimensions or another size
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Expected `state_dict` to hold the weights of one {system!r} model, but they do not fit: {reason}."
        ) from error
    return model.eval()


def convert_file(
    system: str, paths: "str | os.PathLike | Sequence[str | os.PathLike]", config: dict[str, Any] | None = None
) -> "ModelMixin | GuidanceExperts":
    """
    Turn a published file into this library's model; see [`convert_checkpoint`].

    Args:
        system (`str`), config (`dict`, *optional*): See [`convert_checkpoint`].
        paths: The file, of any kind that [`load_original_state_dict`] reads; for 'ppap' the files of all experts.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is damaged, its weights are not those of such a model, or are not finite; the file is named.
    """
    is_one = isinstance(paths, (str, os.PathLike))
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    state_dicts = []
    for file in files:
        state_dicts.append(load_original_state_dict(file))
        expect_finite_weights(state_dicts[-1], file)
    try:
        return convert_checkpoint(system, state_dicts[0] if is_one else state_dicts, config)
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error


def _check_all_used(config: dict[str, Any], system: str) -> None:
    if config:
        raise ValueError(
            f"Expected `config` to hold arguments of the original {system!r} model, but got {list(config)}."
        )


def load_original_state_dict(path: "str | os.PathLike", use_ema: bool = True) -> dict[str, torch.Tensor]:
    """
    Read the weights from a published file or a training checkpoint, without executing code in it.

    Args:
        path (`str` or `os.PathLike`): A file of `torch.save` or safetensors, whatever its name: a state dict, or a training
            checkpoint with entries such as `model`, `ema` or `state_dict`.
        use_ema (`bool`): Whether to take the averaged weights from a training checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: The weights under the original's names, without the prefixes of `DataParallel`,
        `torch.compile` and other wrappers.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is damaged, or holds no state dict.
    """
    return state_dict_in(read_weights(path), str(path), use_ema)
