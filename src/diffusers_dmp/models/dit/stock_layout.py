"""Conversion of weights and configuration from Diffusers' own DiT and to it.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/dit_transformer_2d.py

The stock class has a copy of the timestep and label embedder in every block, and three matrices for query, key and value
where [`DiTModel`] has one. Most other names are the same in both.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ...saving.adapters import check_no_adapters
from ...saving.mixins import StandaloneModelMixin
from ...saving.weight_files import check_saved_folder, expect_all_loaded
from ..loading import HUB_ARGUMENTS, in_dtype

STOCK_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second one in old checkpoints
STOCK_FREQ_SHIFT = 1.0  # in the stock class's timestep frequencies, not configurable; the published DiT has 0

_SHARED_CONFIG = (  # arguments that both classes have
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "dropout", "sample_size",
    "patch_size", "norm_eps",
)  # fmt: skip
_EMBEDDER = "norm1.emb."
_RENAMED = {"attn1.to_out.0.": "attn.to_out."}  # stock → ours, inside a block


def load_stock(stock_model_or_path: "nn.Module | str | os.PathLike", **kwargs: Any) -> DiTTransformer2DModel:
    """
    Load Diffusers' own DiT, if it is not loaded yet.

    Args:
        stock_model_or_path (`DiTTransformer2DModel`, `str` or `os.PathLike`): The model, its folder, or its Hub id.
        kwargs: Arguments of `DiTTransformer2DModel.from_pretrained`, if a path is given.

    Raises:
        ValueError: if a model of another class is given, a file of a local folder is damaged, or `output_loading_info` is asked for.
    """
    if kwargs.pop("output_loading_info", False):
        raise ValueError(
            "Expected no `output_loading_info` for a model of Diffusers' own class, whose weights get other names here, but got "
            "True. `DiTTransformer2DModel.from_pretrained` has it; a missing weight is refused in any case."
        )
    if isinstance(stock_model_or_path, DiTTransformer2DModel):
        return stock_model_or_path
    if isinstance(stock_model_or_path, nn.Module):
        raise ValueError(
            f"Expected `stock_model_or_path` to be a DiTTransformer2DModel, but got a {type(stock_model_or_path).__name__}."
        )
    folder = Path(stock_model_or_path, kwargs.get("subfolder") or "")
    check_saved_folder(folder, components=False)
    model, info = DiTTransformer2DModel.from_pretrained(stock_model_or_path, **kwargs | {"output_loading_info": True})
    expect_all_loaded(info, folder)
    return model


def config_from_stock(stock_config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Translate the stock model's configuration.

    Args:
        stock_config (`Mapping[str, Any]`): The configuration of a [`DiTTransformer2DModel`].

    Returns:
        `dict[str, Any]`: Arguments of [`DiTModel`], with the stock semantics.

    Raises:
        ValueError: if the stock model is no DiT as published.
    """
    required = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    for name, value in required.items():
        if stock_config[name] != value:
            raise ValueError(f"Expected the stock model's `{name}` to be {value!r}, but got {stock_config[name]!r}.")
    return {name: stock_config[name] for name in _SHARED_CONFIG} | {
        "num_classes": stock_config["num_embeds_ada_norm"],
        "class_dropout_prob": 0.1,  # the stock class always has a null class
        "downscale_freq_shift": STOCK_FREQ_SHIFT,
    }


def weights_from_stock(stock_weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Translate the stock model's weights.

    Args:
        stock_weights (`dict[str, torch.Tensor]`): The state dict of a [`DiTTransformer2DModel`].

    Returns:
        `dict[str, torch.Tensor]`: The state dict of a [`DiTModel`].

    Raises:
        ValueError: if the blocks' embedders differ from one another.
    """
    weights: dict[str, torch.Tensor] = {}
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
    """
    Translate weights for the stock model: the inverse of [`weights_from_stock`].

    Args:
        weights (`dict[str, torch.Tensor]`): The state dict of a [`DiTModel`].
        num_layers (`int`): The number of blocks.
        num_classes (`int`): The number of classes without the null class.

    Returns:
        `dict[str, torch.Tensor]`: The state dict of a [`DiTTransformer2DModel`].
    """
    stock_weights = {}
    for name, tensor in weights.items():
        if name.startswith("time_label_embed."):
            name = name.removeprefix("time_label_embed.").replace("class_embedder", "class_embedder.embedding_table")
            if "class_embedder" in name and len(tensor) == num_classes:
                # the stock class always has a null class; for a model without one it is zero
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


class StockDiTMixin(StandaloneModelMixin, ModelMixin):
    """Add loading from Diffusers' own DiT, and export to it, to [`DiTModel`]."""

    @classmethod
    def from_diffusers(cls, stock_model_or_path: "nn.Module | str | os.PathLike", **kwargs: Any) -> Self:
        """
        Load Diffusers' own DiT with its own ("stock") semantics, so that the outputs are those of the stock model.

        A subclass gets the weights, and the default values of its own arguments.

        Args:
            stock_model_or_path (`DiTTransformer2DModel`, `str` or `os.PathLike`): The model, its folder, or its Hub id.
            kwargs: `subfolder`, `torch_dtype`, … for `DiTTransformer2DModel.from_pretrained`, if a path is given.

        Returns:
            [`DiTModel`]: The model in eval mode.

        Raises:
            ValueError: if the blocks' embedders differ from one another, so that one embedder cannot replace them. In every
                published checkpoint they are copies.
        """
        stock = load_stock(stock_model_or_path, **kwargs)
        check_no_adapters(stock, "convert it")
        model = cls(**config_from_stock(stock.config))
        model.load_state_dict(weights_from_stock(stock.state_dict()))
        return in_dtype(model, stock.dtype).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs: Any) -> Self:
        """
        Load a saved model, or a saved stock model through [`~DiTModel.from_diffusers`]; see [`ModelMixin.from_pretrained`].

        Raises:
            ValueError: if `output_loading_info` is asked for with a stock model, whose weights have other names.
        """
        where = {name: kwargs[name] for name in (*HUB_ARGUMENTS, "revision", "subfolder") if name in kwargs}
        if cls.load_config(pretrained_model_name_or_path, **where).get("_class_name") in STOCK_CLASSES:
            return cls.from_diffusers(pretrained_model_name_or_path, **kwargs)
        model: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return model

    def to_diffusers(self, approximate: bool = False) -> DiTTransformer2DModel:
        """
        Export to Diffusers' own [`DiTTransformer2DModel`], usable without this package.

        The export of a model with the stock semantics has the same weights and outputs. For the published semantics the
        stock class has no argument: such a model's export has other timestep frequencies, until they are set by

        ```py
        for block in stock.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        ```

        (The LayerNorm eps is saved in the stock configuration and needs no such line.)

        Args:
            approximate (`bool`): Whether to export a model with the published semantics.

        Returns:
            [`DiTTransformer2DModel`]: The stock model in eval mode.

        Raises:
            ValueError: if the semantics are not the stock ones and `approximate` is False, or there are adapters (LoRA).
        """
        check_no_adapters(self, "export it")
        config = self.config
        if config.get("sharing_ratio", 1) != 1:
            raise ValueError(
                f"Expected a model without routing, which the stock class cannot express, but got `sharing_ratio` "
                f"{config.sharing_ratio}."
            )
        if config.downscale_freq_shift != STOCK_FREQ_SHIFT and not approximate:
            raise ValueError(
                f"Expected `downscale_freq_shift` to be {STOCK_FREQ_SHIFT}, the stock semantics, but got "
                f"{config.downscale_freq_shift}. Pass `approximate=True` to export it nevertheless; the stock model then equals "
                f"this one up to rounding after `block.norm1.emb.time_proj.downscale_freq_shift = "
                f"{config.downscale_freq_shift:g}` for each of its `transformer_blocks`."
            )
        stock = DiTTransformer2DModel(
            **{name: config[name] for name in _SHARED_CONFIG}, num_embeds_ada_norm=config.num_classes
        )
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("task_routing.")}
        stock.load_state_dict(weights_to_stock(weights, config.num_layers, config.num_classes))
        return in_dtype(stock, self.dtype).eval()
