"""Checkpoints of the published implementations in.

DiT: https://github.com/facebookresearch/DiT (`dit`), DTR: https://github.com/byeongjun-park/DTR (`dtr`), Remix-DiT: the
code of https://arxiv.org/abs/2412.05628 (`remix`), DMP: https://github.com/sangminwoo/DMP (`dmp`), Patch Diffusion: see
`patch_diffusion.py`, ADM: `adm.py`, PPAP: `ppap.py`. What the shapes of the weights tell (width, depth, patch size, channels, classes, learned variance, image size, bases, experts, prompts) need not
be given.
"""

import argparse
import math
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file

from ..guidance import GuidanceExperts
from ..models.dit.model import DIT_SIZES, DiTModel
from ..models.dtr_transformer_2d import DTRTransformer2DModel
from ..models.loading import check_weights
from ..models.remix_dit import RemixDiTModel
from ..plugins import PromptPatch
from .adm import build_adm_unet, load_adm_unet
from .patch_diffusion import build_patched_unet, load_patched_unet
from .ppap import convert_ppap

_RENAMED = (  # original → ours
    ("x_embedder.", "pos_embed."),
    ("t_embedder.mlp.0.", "time_label_embed.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "time_label_embed.timestep_embedder.linear_2."),
    ("y_embedder.embedding_table.", "time_label_embed.class_embedder."),
    ("blocks.", "transformer_blocks."),
    ("adaLN_modulation.1.", "norm1.linear."),
    ("attn.qkv.", "attn.to_qkv."),
    ("attn.proj.", "attn.to_out."),
    ("mlp.fc1.", "ff.net.0.proj."),
    ("mlp.fc2.", "ff.net.2."),
    ("final_layer.norm1.linear.", "proj_out_1."),  # adaLN_modulation.1 by its new name
    ("final_layer.linear.", "proj_out_2."),
    ("coefficients.weight", "mixing_logits"),
)
_ROUTING_MASK = ".routing._unit_mapping"  # (T, D) per block, derived from the configuration unless it is random
_TELLING_SHAPES = {  # the weights that the configuration is read from, and their number of dimensions
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
_BASES = "blocks.0.attn.qkv.weight"  # (K, 3D, D) in Remix-DiT
_PATCH_RENAMED = {
    "prompt_embeddings": "prompts",
    "gate.weight": "gate_proj.weight",
    "gate.bias": "gate_proj.bias",
    "w_noise": "noise_weight",
}
_PATCH_GATES = {"linear": "linear", "PT": "none"}  # the original's `gate_type`; its "FT" has no prompts
_DTR_ROUTINGS = {"DTR": "window", "random": "random"}  # the original's `init_method`


def convert_checkpoint(
    system: str,
    state_dict: "dict[str, torch.Tensor] | Sequence[dict[str, torch.Tensor]]",
    config: dict[str, Any] | None = None,
) -> "ModelMixin | GuidanceExperts":
    """
    Turn the state dict of a published implementation into this library's model.

    Args:
        system (`str`): 'dit', 'dtr', 'remix', 'dmp', 'patch_diffusion', 'adm' or 'ppap'.
        state_dict (`dict[str, torch.Tensor]`): Under the original's parameter names
            ([`load_original_state_dict`] reads it from a file); for 'ppap' a list of them, one for each expert.
        config (`dict`, *optional*): The original constructor's arguments under their own names: `num_heads` (needed for
            a width of no published size), `num_classes`, `class_dropout_prob`, `learn_sigma`, …, and for DTR
            `sharing_ratio`, `alpha`, `taskcount` and `init_method`, for DMP `vp_type`, `topk` and `uncond`, for Patch
            Diffusion and ADM `image_size`, `num_head_channels`, …. Where the weights contradict it they are refused.

    Returns:
        [`DiTModel`], [`DTRTransformer2DModel`], [`RemixDiTModel`], [`PatchedUNet2DModel`] or, for 'adm', Diffusers' [`UNet2DModel`],
        in eval mode and float32; for 'ppap' [`GuidanceExperts`]. For 'dmp' a [`DiTModel`] with
        its patch attached, which is `PromptPatch.attached_to(model)`.

    Raises:
        ValueError: if `system` or an argument in `config` is unknown, `num_heads` is needed, or a weight is missing,
            unknown or of another shape than `config` says (the first such key is named).
    """
    builders = {
        "dit": _build_dit,
        "dtr": _build_dtr,
        "remix": _build_remix,
        "dmp": _build_dmp,
        "patch_diffusion": build_patched_unet,
        "adm": build_adm_unet,
    }
    if system not in (*builders, "ppap"):
        raise ValueError(f"Expected `system` to be one of {', '.join(builders)}, ppap, but got {system!r}.")
    config = dict(config or {})
    if system == "ppap":
        experts = convert_ppap(state_dict, config)
        _expect_consumed(config, system)
        return experts
    weights = {key: tensor.float() for key, tensor in state_dict.items()}
    model = builders[system](weights, config)
    _expect_consumed(config, system)
    loaders = {"patch_diffusion": load_patched_unet, "adm": load_adm_unet}
    loaders.get(system, _load_dit)(model, weights)
    return model.eval()


def _expect_consumed(config: dict[str, Any], system: str) -> None:
    if config:
        raise ValueError(
            f"Expected `config` to hold arguments of the original {system!r} model, but got {list(config)}."
        )


def load_original_state_dict(path: "str | os.PathLike", use_ema: bool = True) -> dict[str, torch.Tensor]:
    """
    Read a published `.pt` (never executing code in it) or `.safetensors` file.

    Args:
        path: The file; a training checkpoint with `model` and `ema` entries, or bare weights.
        use_ema (`bool`): Which of the two to take from a training checkpoint.

    Raises:
        ValueError: if the file holds no state dict.
    """
    if str(path).endswith(".safetensors"):
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # the training arguments lie in the same file
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


def _build_dit(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> DiTModel:
    return DiTModel(**_dit_config(weights, config))


def _build_dtr(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> DTRTransformer2DModel:
    init_method = config.pop("init_method", "DTR")
    if init_method not in _DTR_ROUTINGS:
        raise ValueError(f"Expected `init_method` to be one of {', '.join(_DTR_ROUTINGS)}, but got {init_method!r}.")
    masks = {key: weights.pop(key).bool() for key in list(weights) if key.endswith(_ROUTING_MASK)}
    first_mask = next(iter(masks.values()), None)
    if init_method == "random":
        if first_mask is None or any(not torch.equal(mask, first_mask) for mask in masks.values()):
            raise ValueError(
                f"Expected one random mask for all blocks in `*{_ROUTING_MASK}`, but got {len(masks)} masks."
            )
        weights["task_routing.random_masks"] = first_mask
    model = DTRTransformer2DModel(
        sharing_ratio=config.pop("sharing_ratio", 0.8),
        routing_alpha=config.pop("alpha", 4.0),
        num_train_timesteps=config.pop("taskcount", 1000),
        routing=_DTR_ROUTINGS[init_method],
        **_dit_config(weights, config),
    )
    if init_method != "random":
        for key, mask in masks.items():
            if not torch.equal(mask, model.task_routing.masks()):
                raise ValueError(
                    f"Expected {key!r} in `state_dict` to hold the windows of `sharing_ratio` {model.config.sharing_ratio} "
                    f"and `alpha` {model.config.routing_alpha}, but got others; name the right ones in `config`."
                )
    return model


def _build_remix(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> RemixDiTModel:
    dit_config = _dit_config(weights, config)
    for key, ndim in {"coefficients.weight": 2, _BASES: 3}.items():
        _check_ndim(weights, key, ndim)
    num_experts, num_bases = weights["coefficients.weight"].shape
    return RemixDiTModel(
        num_bases=config.pop("n_basis", num_bases), num_experts=config.pop("n_experts", num_experts), **dit_config
    )


def _build_dmp(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> DiTModel:
    gate_type = config.pop("gate_type", "linear" if "gate.weight" in weights else "PT")
    if gate_type not in _PATCH_GATES:
        raise ValueError(f"Expected `gate_type` to be one of {', '.join(_PATCH_GATES)}, but got {gate_type!r}.")
    if config.pop("uncond", False):
        config["class_dropout_prob"] = 0.0
    config.pop("init_type", None)  # of what was trained since
    mode, topk = config.pop("vp_type", None), config.pop("topk", 1.0)
    model = DiTModel(**_dit_config(weights, config))

    _check_ndim(weights, "prompt_embeddings", 3)
    depth, num_prompts, _ = weights["prompt_embeddings"].shape
    num_prompts = config.pop("num_tokens", num_prompts)
    if mode is None:
        if num_prompts == (model.config.sample_size // model.config.patch_size) ** 2:
            raise ValueError(
                f"Expected `config` to give the `vp_type`, 'add' or 'prepend', of {num_prompts} prompts for as many image "
                "tokens, but got none."
            )
        mode = "prepend"
    patch = PromptPatch(
        hidden_size=model.config.num_attention_heads * model.config.attention_head_dim,
        num_prompts=num_prompts,
        depth=config.pop("pt_depth", depth),
        mode=mode,
        gate=_PATCH_GATES[gate_type],
        topk=topk,
    )
    patch_weights = {name: weights.pop(key) for key, name in _PATCH_RENAMED.items() if key in weights}
    original_names = {name: key for key, name in _PATCH_RENAMED.items()}
    check_weights(patch, patch_weights, "state_dict", original_names.get)
    patch.load_state_dict(patch_weights)
    patch.attach(model).eval()
    return model


def _check_ndim(weights: dict[str, torch.Tensor], key: str, ndim: int) -> None:
    shape = tuple(weights[key].shape) if key in weights else None
    if shape is None or len(shape) != ndim:
        raise ValueError(f"Expected {key!r} in `state_dict` to have {ndim} dimensions, but got the shape {shape}.")


def _dit_config(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Our configuration, from the shapes and from what `config` (whose entries are consumed) adds to them."""
    for key, ndim in _TELLING_SHAPES.items():
        _check_ndim(weights, key, ndim)
    width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    num_label_rows = len(weights["y_embedder.embedding_table.weight"])
    out_channels = len(weights["final_layer.linear.weight"]) // patch_size**2
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)

    input_size = config.pop("input_size", None)
    if "pos_embed" in weights:  # the table is fixed, so dropped: only its length, that of a square image, is of use
        num_tokens = weights.pop("pos_embed").shape[1]
        input_size = input_size or patch_size * math.isqrt(num_tokens)
        if num_tokens != (input_size // patch_size) ** 2:
            raise ValueError(
                f"Expected 'pos_embed' in `state_dict` to have {(input_size // patch_size) ** 2} tokens, as `input_size` "
                f"{input_size} says, but got {num_tokens}."
            )
    width = config.pop("hidden_size", width)
    in_channels = config.pop("in_channels", in_channels)
    learn_sigma = config.pop("learn_sigma", out_channels == 2 * in_channels)
    num_heads = config.pop("num_heads", {size[1]: size[2] for size in DIT_SIZES.values()}.get(width))
    if num_heads is None or width % num_heads:
        raise ValueError(
            f"Expected `config` to give a `num_heads` that divides the width {width}, but got {num_heads}."
        )
    mlp_ratio = config.pop("mlp_ratio", 4.0)
    if mlp_ratio != 4:
        raise ValueError(f"Expected `mlp_ratio` to be 4, as in every published DiT, but got {mlp_ratio}.")

    # one row more than classes, if labels were dropped in training; the published default is that they were
    num_classes = config.pop("num_classes", None)
    if num_classes is None:
        class_dropout_prob = config.pop("class_dropout_prob", 0.1)
        num_classes = num_label_rows - (class_dropout_prob > 0)
    else:
        class_dropout_prob = config.pop("class_dropout_prob", 0.1 if num_label_rows > num_classes else 0.0)
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "in_channels": in_channels,
        "out_channels": in_channels * (2 if learn_sigma else 1),
        "num_layers": config.pop("depth", depth),
        "sample_size": input_size or 32,
        "patch_size": config.pop("patch_size", patch_size),
        "num_classes": num_classes,
        "class_dropout_prob": class_dropout_prob,
    }


def _load_dit(model: DiTModel, weights: dict[str, torch.Tensor]) -> None:
    renamed = {_rename(key, _RENAMED): tensor for key, tensor in weights.items()}
    original_names = dict(zip(renamed, weights))
    to_original = [(part, original_part) for original_part, part in reversed(_RENAMED)]
    check_weights(model, renamed, "state_dict", lambda name: original_names.get(name) or _rename(name, to_original))
    model.load_state_dict(renamed)


def _rename(key: str, parts: "Sequence[tuple[str, str]]") -> str:
    for old, new in parts:
        key = key.replace(old, new)
    return key
