"""Helpers that the conversions share: checks of what is given, and loading weights under other names."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..models.loading import check_weights

Network = TypeVar("Network", bound=nn.Module)


class NamedWeights(dict[str, torch.Tensor]):
    """Weights of which a missing one is named to the user."""

    def __missing__(self, name: str) -> torch.Tensor:
        raise ValueError(f"Expected `state_dict` to hold {name!r}, but it is missing.")


def in_float32(state_dict: Mapping[str, torch.Tensor]) -> NamedWeights:
    """
    Cast weights of any precision, float8 included, to float32; masks and counters stay as they are.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The weights.

    Returns:
        [`NamedWeights`]: The weights under the same names.

    Raises:
        ValueError: if a weight is one number, or of integers, as those of a quantised model, which need their scales.
    """
    weights = NamedWeights()
    for name, tensor in state_dict.items():
        is_weight = tensor.is_floating_point()
        if is_weight and tensor.ndim == 0:
            raise ValueError(f"Expected {name!r} in `state_dict` to be a weight, but got the number {tensor:g}.")
        if not is_weight and tensor.ndim > 0 and ((tensor < 0) | (tensor > 1)).any():
            raise ValueError(
                f"Expected {name!r} in `state_dict` to hold floating-point numbers, but got {tensor.dtype}, as of a "
                "quantised model; convert the weights that it was made of."
            )
        weights[name] = tensor.float() if is_weight else tensor
    return weights


def check_ndim(weights: Mapping[str, torch.Tensor], ndims: Mapping[str, int]) -> None:
    """
    Check that the weights from whose shapes a configuration is read are there.

    Args:
        weights (`Mapping[str, torch.Tensor]`): The weights under the original's names.
        ndims (`Mapping[str, int]`): The number of dimensions that each of these weights should have.

    Raises:
        ValueError: if one is missing or has another number of dimensions.
    """
    for key, ndim in ndims.items():
        shape = tuple(weights[key].shape) if key in weights else None
        if shape is None or len(shape) != ndim:
            raise ValueError(f"Expected {key!r} in `state_dict` to have {ndim} dimensions, but got the shape {shape}.")


def pop_supported(config: dict[str, Any], supported: Mapping[str, Any]) -> None:
    """
    Remove arguments of which only one value is supported from the original's configuration.

    Args:
        config (`dict[str, Any]`): The original's arguments; changed in place.
        supported (`Mapping[str, Any]`): The values that are supported.

    Raises:
        ValueError: if an argument has another value.
    """
    for name, value in supported.items():
        given = config.pop(name, value)
        if given != value:
            raise ValueError(f"Expected `{name}` to be {value}, as in the published models, but got {given}.")


def group_heads_by_part(weights: dict[str, torch.Tensor], head_dim: int) -> None:
    """
    Reorder the attention matrices from one head after the other to all heads' queries, all keys, all values.

    Args:
        weights (`dict[str, torch.Tensor]`): Weights with `.qkv.` in their names, of shape (heads·3·d, …), become
            (3·heads·d, …); changed in place.
        head_dim (`int`): d, the number of channels per head.
    """
    for key in weights:
        if ".qkv." in key:
            weights[key] = weights[key].unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)


def split_qkv(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """
    Take the part of a fused query-key-value matrix that a weight of Diffusers' attention is.

    Args:
        name (`str`): The weight's name in Diffusers.
        tensor (`torch.Tensor` of shape (3·heads·d, …)): The fused matrix, for `to_q`, `to_k` and `to_v`; any other weight
            is returned as it is.

    Returns:
        `torch.Tensor`: The weight.
    """
    part = next((part for part in "qkv" if f".to_{part}." in name), None)
    return tensor if part is None else tensor.chunk(3)["qkv".index(part)]


def load_renamed(
    model: Network,
    weights: dict[str, torch.Tensor],
    module_names: dict[str, str],
    translate: Callable[[str, torch.Tensor, Network], torch.Tensor],
) -> None:
    """
    Load the original's weights into a model.

    Args:
        model (`nn.Module`): The model.
        weights (`dict[str, torch.Tensor]`): The weights under the original's names.
        module_names (`dict[str, str]`): From the names of the model's modules to the original's.
        translate (`Callable`): Turns the name of one of the model's weights, the original tensor, and the model into the
            tensor that the model needs. It returns a tensor whose shape does not fit unchanged.

    Raises:
        ValueError: if a weight is missing, unknown, or of another shape; it is named.
    """
    names = {}  # from the model's names to the original's
    for name in model.state_dict():
        module, _, part = name.rpartition(".")
        names[name] = f"{module_names[module]}.{part}"
    for key in names.values():
        if key not in weights:
            raise ValueError(f"Expected `state_dict` to hold {key!r}, but it is missing.")
    renamed = {name: translate(name, weights[key], model) for name, key in names.items()}
    known = set(names.values())
    surplus = {key: weights[key] for key in weights if key not in known}
    check_weights(model, renamed | surplus, "state_dict", lambda name: names.get(name, name))
    model.load_state_dict(renamed)
