"""What every way of loading foreign weights needs."""

from collections.abc import Callable

import torch
from torch import nn


def check_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], source: str, source_name: Callable[[str], str] = str
) -> None:
    """
    Refuse weights that do not fit, by the name of the first that does not.

    Args:
        model (`nn.Module`): What they are meant for; may be on the meta device.
        weights (`dict[str, torch.Tensor]`): Under the model's names.
        source (`str`): The argument that they came in, for the message.
        source_name (`Callable[[str], str]`): From the model's names to those that the user knows.

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


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in that dtype; Diffusers warns of a cast even where there is none."""
    return model if model.dtype == dtype else model.to(dtype)
