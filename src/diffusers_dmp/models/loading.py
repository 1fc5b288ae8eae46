"""Helpers for loading weights that another implementation saved."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

# What `from_pretrained` passes to every download of a call; `revision` and `subfolder` are those of one repository.
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token")

Model = TypeVar("Model", bound=nn.Module)


def check_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, source_name: Callable[[str], str] = str
) -> None:
    """
    Check that weights fit a model, and name the first that does not.

    Args:
        model (`nn.Module`): The model to load them into; may be on the meta device.
        weights (`dict[str, torch.Tensor]`): The weights under the model's parameter names.
        source (`str`): The argument that the user gave them in, for the message.
        source_name (`Callable[[str], str]`): Turns one of the model's names into the name that the user knows.

    Raises:
        ValueError: if a weight is unknown, missing, or of another shape than the model's.
    """
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name not in expected:
            raise ValueError(
                f"Expected `{source}` to hold the keys of a {type(model).__name__}, but got {source_name(name)!r}."
            )
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"Expected {source_name(name)!r} in `{source}` to have the shape {tuple(expected[name].shape)}, "
                f"but got {tuple(tensor.shape)}."
            )
    for name in expected:
        if name not in weights:
            raise ValueError(f"Expected `{source}` to hold {source_name(name)!r}, but it is missing.")


def in_dtype(model: Model, dtype: torch.dtype) -> Model:
    """
    Cast a model, unless it has the dtype already: Diffusers warns of every cast.

    Args:
        model (`ModelMixin`): The model.
        dtype (`torch.dtype`): The dtype of its weights.

    Returns:
        `ModelMixin`: The same model.
    """
    return model if model.dtype == dtype else model.to(dtype)
