"""Conversion of published checkpoints of the DiT family: DiT, DTR, Remix-DiT and DMP.

DiT: https://github.com/facebookresearch/DiT, DTR: https://github.com/byeongjun-park/DTR, Remix-DiT: the code of
https://arxiv.org/abs/2412.05628, DMP: https://github.com/sangminwoo/DMP.

Every `build_…` makes a new model from the shapes of the weights, and from `config`, which holds arguments of the original's
constructor under their own names. It removes from both what it has read.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..models.dit.configuration import DIT_SIZES
from ..models.dit.model import DiTModel
from ..models.dtr_transformer_2d import DTRTransformer2DModel
from ..models.loading import check_weights
from ..models.remix_dit import RemixDiTModel
from ..plugins import PromptPatch
from .renaming import check_ndim, pop_supported

Weights = dict[str, torch.Tensor]

_RENAMED = (  # parts of names: the original's and ours, to be replaced in this order
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
_ROUTING_MASK = ".routing._unit_mapping"  # (T, D) per block; the configuration determines it, unless it is random
_DIT_NDIMS = {  # weights from whose shapes the configuration is read, and their number of dimensions
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
_REMIX_NDIMS = {"coefficients.weight": 2, "blocks.0.attn.qkv.weight": 3}  # (E, K) and (K, 3D, D)
_PROMPTS_RENAMED = {
    "prompt_embeddings": "prompts",
    "gate.weight": "gate_proj.weight",
    "gate.bias": "gate_proj.bias",
    "w_noise": "noise_weight",
}
_PROMPT_GATES = {"linear": "linear", "PT": "none"}  # the original's `gate_type`; its "FT" has no prompts
_DTR_ROUTINGS = {"DTR": "window", "random": "random"}  # the original's `init_method`


def build_dit(weights: Weights, config: dict[str, Any]) -> DiTModel:
    """
    Make a new DiT that the weights of the published implementation fit.

    Args:
        weights (`dict[str, torch.Tensor]`): The weights under the original's names.
        config (`dict[str, Any]`): Arguments of the original's constructor.

    Returns:
        [`DiTModel`]: The model; [`load_dit`] loads the weights.

    Raises:
        ValueError: if weights or arguments do not fit one another.
    """
    return DiTModel(**_dit_config(weights, config))


def build_dtr(weights: Weights, config: dict[str, Any]) -> DTRTransformer2DModel:
    """Make a new DTR model; see [`build_dit`]. A random mask of channels is renamed, masks of windows are only checked."""
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
                    f"and `alpha` {model.config.routing_alpha}, but got others; give the right ones in `config`."
                )
    return model


def build_remix(weights: Weights, config: dict[str, Any]) -> RemixDiTModel:
    """Make a new Remix-DiT; see [`build_dit`]."""
    dit_config = _dit_config(weights, config)
    check_ndim(weights, _REMIX_NDIMS)
    num_experts, num_bases = weights["coefficients.weight"].shape
    return RemixDiTModel(
        num_bases=config.pop("n_basis", num_bases), num_experts=config.pop("n_experts", num_experts), **dit_config
    )


def build_dmp(weights: Weights, config: dict[str, Any]) -> DiTModel:
    """Make a new DiT with its prompts attached; see [`build_dit`]. The prompts' weights are loaded and removed."""
    gate_type = config.pop("gate_type", "linear" if "gate.weight" in weights else "PT")
    if gate_type not in _PROMPT_GATES:
        raise ValueError(f"Expected `gate_type` to be one of {', '.join(_PROMPT_GATES)}, but got {gate_type!r}.")
    if config.pop("uncond", False):
        config["class_dropout_prob"] = 0.0
    config.pop("init_type", None)  # the initialisation does not matter to trained weights
    mode, topk = config.pop("vp_type", None), config.pop("topk", 1.0)
    model = DiTModel(**_dit_config(weights, config))

    check_ndim(weights, {"prompt_embeddings": 3})
    depth, num_prompts, _ = weights["prompt_embeddings"].shape
    num_prompts = config.pop("num_tokens", num_prompts)
    if mode is None:
        if num_prompts == (model.config.sample_size // model.config.patch_size) ** 2:
            raise ValueError(
                f"Expected `config` to give the `vp_type`, 'add' or 'prepend', of {num_prompts} prompts for as many image "
                "tokens, but got none."
            )
        mode = "prepend"
    prompts = PromptPatch(
        hidden_size=model.config.num_attention_heads * model.config.attention_head_dim,
        num_prompts=num_prompts,
        depth=config.pop("pt_depth", depth),
        mode=mode,
        gate=_PROMPT_GATES[gate_type],
        topk=topk,
    )
    prompt_weights = {name: weights.pop(key) for key, name in _PROMPTS_RENAMED.items() if key in weights}
    original_names = {name: key for key, name in _PROMPTS_RENAMED.items()}
    check_weights(prompts, prompt_weights, "state_dict", lambda name: original_names.get(name, name))
    prompts.load_state_dict(prompt_weights)
    prompts.attach(model).eval()
    return model


def load_dit(model: DiTModel, weights: Weights) -> None:
    """
    Load the original's weights into a model of the DiT family.

    Args:
        model ([`DiTModel`]): What one of the `build_…` functions made of these weights.
        weights (`dict[str, torch.Tensor]`): The weights under the original's names.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape; it is named.
    """
    renamed = {_rename(key, _RENAMED): tensor for key, tensor in weights.items()}
    original_names = dict(zip(renamed, weights))
    to_original = [(part, original_part) for original_part, part in reversed(_RENAMED)]
    check_weights(model, renamed, "state_dict", lambda name: original_names.get(name) or _rename(name, to_original))
    model.load_state_dict(renamed)


def _dit_config(weights: Weights, config: dict[str, Any]) -> dict[str, Any]:
    """Read the arguments of [`DiTModel`] from the weights' shapes and from `config`."""
    check_ndim(weights, _DIT_NDIMS)
    width, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    out_channels = len(weights["final_layer.linear.weight"]) // patch_size**2
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    sample_size = _sample_size(weights, config, patch_size)

    width = config.pop("hidden_size", width)
    in_channels = config.pop("in_channels", in_channels)
    learn_sigma = config.pop("learn_sigma", out_channels == 2 * in_channels)
    num_heads = config.pop("num_heads", {size[1]: size[2] for size in DIT_SIZES.values()}.get(width))
    if num_heads is None or width % num_heads:
        raise ValueError(
            f"Expected `config` to give a `num_heads` that divides the width {width}, but got {num_heads}."
        )
    pop_supported(config, {"mlp_ratio": 4})
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "in_channels": in_channels,
        "out_channels": in_channels * (2 if learn_sigma else 1),
        "num_layers": config.pop("depth", depth),
        "sample_size": sample_size,
        "patch_size": config.pop("patch_size", patch_size),
        **_class_config(len(weights["y_embedder.embedding_table.weight"]), config),
    }


def _sample_size(weights: Weights, config: dict[str, Any], patch_size: int) -> int:
    """Height and width of the (latent) images, from the table of positions if there is one."""
    input_size = config.pop("input_size", None)
    if "pos_embed" in weights:  # a fixed table that our model computes: only its length is needed
        num_tokens = weights.pop("pos_embed").shape[1]
        input_size = input_size or patch_size * math.isqrt(num_tokens)
        if num_tokens != (input_size // patch_size) ** 2:
            raise ValueError(
                f"Expected 'pos_embed' in `state_dict` to have {(input_size // patch_size) ** 2} tokens, as `input_size` "
                f"{input_size} says, but got {num_tokens}."
            )
    return input_size or 32


def _class_config(num_rows: int, config: dict[str, Any]) -> dict[str, Any]:
    """The number of classes and the label dropout: if labels were dropped in training, there is one row for the null class."""
    num_classes = config.pop("num_classes", None)
    if num_classes is None:
        class_dropout_prob = config.pop("class_dropout_prob", 0.1)  # the published default
        num_classes = num_rows - (class_dropout_prob > 0)
    else:
        class_dropout_prob = config.pop("class_dropout_prob", 0.1 if num_rows > num_classes else 0.0)
    return {"num_classes": num_classes, "class_dropout_prob": class_dropout_prob}


def _rename(key: str, parts: Sequence[tuple[str, str]]) -> str:
    for old, new in parts:
        key = key.replace(old, new)
    return key
