"""Weights and configuration of Diffusers' own DiT, there and back.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/dit_transformer_2d.py

The stock class keeps a copy of the timestep and label embedder in every block, and three matrices where we have one
for query, key and value. All other names are the same in both.
"""

import os

import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ..loading import in_dtype

STOCK_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in the first published checkpoints
STOCK_FREQ_SHIFT = 1.0  # of the timestep frequencies; fixed in the stock class, where the published DiT has 0

_SHARED_CONFIG = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "dropout", "sample_size",
    "patch_size", "norm_eps",
)  # fmt: skip
_EMBEDDER = "norm1.emb."
_RENAMED = {"attn1.to_out.0.": "attn.to_out."}  # stock → ours, inside a block


def load_stock(stock_model_or_path: "nn.Module | str | os.PathLike", **kwargs) -> DiTTransformer2DModel:
    """The stock model itself, from a folder, or from the Hub."""
    if isinstance(stock_model_or_path, DiTTransformer2DModel):
        return stock_model_or_path
    if isinstance(stock_model_or_path, nn.Module):
        raise ValueError(
            f"Expected `stock_model_or_path` to be a DiTTransformer2DModel, but got a {type(stock_model_or_path).__name__}."
        )
    return DiTTransformer2DModel.from_pretrained(stock_model_or_path, **kwargs)


def config_from_stock(stock_config) -> dict:
    """Our constructor's arguments, with the stock semantics."""
    required = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    for name, value in required.items():
        if stock_config[name] != value:
            raise ValueError(f"Expected the stock model's `{name}` to be {value!r}, but got {stock_config[name]!r}.")
    return {name: stock_config[name] for name in _SHARED_CONFIG} | {
        "num_classes": stock_config.num_embeds_ada_norm,
        "class_dropout_prob": 0.1,  # the stock class always has a null class
        "downscale_freq_shift": STOCK_FREQ_SHIFT,
    }


def weights_from_stock(stock_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stock state dict under our names."""
    weights = {}
    for name, tensor in stock_weights.items():
        if _EMBEDDER in name:
            shared_name = "time_label_embed." + name.split(_EMBEDDER)[1].replace(
                "class_embedder.embedding_table", "class_embedder"
            )
            if not torch.equal(weights.setdefault(shared_name, tensor), tensor):
                raise ValueError(
                    f"Expected every block to embed timestep and label alike, but got another `{name}` than block 0 has."
                )
        elif "attn1.to_q." in name:
            fused = torch.cat([stock_weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            weights[name.replace("attn1.to_q", "attn.to_qkv")] = fused
        elif "attn1.to_k." not in name and "attn1.to_v." not in name:
            for stock_part, part in _RENAMED.items():
                name = name.replace(stock_part, part)
            weights[name] = tensor
    return weights


def weights_to_stock(weights: dict[str, torch.Tensor], num_layers: int, num_classes: int) -> dict[str, torch.Tensor]:
    """Our state dict under the stock names: the inverse of [`weights_from_stock`]."""
    stock_weights = {}
    for name, tensor in weights.items():
        if name.startswith("time_label_embed."):
            name = name.removeprefix("time_label_embed.").replace("class_embedder", "class_embedder.embedding_table")
            if "class_embedder" in name and len(tensor) == num_classes:
                # the stock class has a null class in any case; a model that never learned one gets zeros
                tensor = torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
            for layer in range(num_layers):
                stock_weights[f"transformer_blocks.{layer}.{_EMBEDDER}{name}"] = tensor
        elif "attn.to_qkv." in name:
            for part, matrix in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                stock_weights[name.replace("attn.to_qkv", f"attn1.{part}")] = matrix
        else:
            for stock_part, part in _RENAMED.items():
                name = name.replace(part, stock_part)
            stock_weights[name] = tensor
    return stock_weights


def stock_from_dit(model: nn.Module, approximate: bool) -> DiTTransformer2DModel:
    """See [`DiTModel.to_diffusers`]."""
    config = model.config
    if config.get("sharing_ratio", 1) != 1:
        raise ValueError(
            f"Expected a model without routing, which the stock class cannot express, but got `sharing_ratio` "
            f"{config.sharing_ratio}."
        )
    if config.downscale_freq_shift != STOCK_FREQ_SHIFT and not approximate:
        raise ValueError(
            f"Expected `downscale_freq_shift` to be {STOCK_FREQ_SHIFT}, the stock semantics, but got "
            f"{config.downscale_freq_shift}. Pass `approximate=True` to export all the same; the stock model equals this "
            f"one once `block.norm1.emb.time_proj.downscale_freq_shift = {config.downscale_freq_shift:g}` is set on each "
            "of its `transformer_blocks` after loading."
        )
    stock = DiTTransformer2DModel(
        **{name: config[name] for name in _SHARED_CONFIG}, num_embeds_ada_norm=config.num_classes
    )
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("task_routing.")}
    stock.load_state_dict(weights_to_stock(weights, config.num_layers, config.num_classes))
    return in_dtype(stock, model.dtype).eval()
