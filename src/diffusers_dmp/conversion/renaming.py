"""Weights by the original's names into a model of other names."""

from collections.abc import Callable

import torch
from torch import nn

from ..models.loading import check_weights


def load_renamed(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    module_names: dict[str, str],
    translate: Callable[[str, torch.Tensor, nn.Module], torch.Tensor],
) -> None:
    """
    Fill the model with the original's weights.

    Args:
        model (`nn.Module`): All of whose weights the original has.
        weights (`dict[str, torch.Tensor]`): By the original's names.
        module_names (`dict[str, str]`): From the model's modules' names to the original's.
        translate (`Callable`): From a name of the model's, an original tensor and the model to the tensor as the model has it;
            one of a shape that does not fit comes back as it is.

    Raises:
        ValueError: if one is missing, unknown, or of another shape; it is named.
    """
    names = {}  # from ours to the original's
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
