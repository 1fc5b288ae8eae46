"""Find the state dict in a saved object, under the names that the model's own code gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Entries of training checkpoints, in the order in which they are looked for.
_AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "params_ema")
_TRAINED = ("model", "state_dict", "model_state_dict", "module", "params", "weights")
# What wraps a model adds its attribute's name to all weights' names, or, around a part of the model, in their middle.
_WRAPPERS = ("model", "module")
_HIDDEN_WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def state_dict_in(content: Any, source: str, use_ema: bool = True) -> dict[str, torch.Tensor]:
    """
    Find the state dict in a training checkpoint, and remove what wrappers of the model added to its names.

    Args:
        content: What a file holds: a state dict, or dictionaries around it, as deep as they are.
        source (`str`): The file, for the error.
        use_ema (`bool`): Whether to take the averaged weights where there are some.

    Returns:
        `dict[str, torch.Tensor]`: The weights.

    Raises:
        ValueError: if there is none, or a weight is no plain tensor.
    """
    wanted = f"Expected {source!r} to hold a state dict, but got"
    while not _is_state_dict(content):
        if not isinstance(content, Mapping):
            raise ValueError(f"{wanted} {_described(content)}.")
        entries = (*_AVERAGED, *_TRAINED) if use_ema else _TRAINED
        nested = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), None)
        if nested is None:
            raise ValueError(f"{wanted} {_described(content)}.")
        content = nested
    for name, tensor in content.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{wanted} a sparse, quantised or empty tensor by the name {name!r}.")
    names = without_wrappers(list(content))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{wanted} {twice!r} twice, with and without the name of a wrapper.")
    return {name: tensor.detach() for name, tensor in zip(names, content.values())}


def without_wrappers(names: Sequence[str]) -> list[str]:
    """
    Remove what `DataParallel`, `torch.compile`, DeepSpeed, FSDP, Lightning and the like add to the names of weights.

    'module.' and 'model.' are removed while all names begin with one of them. No published layout has such names itself.

    Args:
        names (`Sequence[str]`): The names of all weights.

    Returns:
        `list[str]`: The names without, in order.
    """
    parts = [[part for part in name.split(".") if part not in _HIDDEN_WRAPPERS] for name in names]
    while parts and all(len(each) > 1 and each[0] == parts[0][0] for each in parts) and parts[0][0] in _WRAPPERS:
        parts = [each[1:] for each in parts]
    return [".".join(each) for each in parts]


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())
    )


def _described(content: Any) -> str:
    """Say in words what something is that is no state dict."""
    if isinstance(content, torch.Tensor):
        return f"one tensor of the shape {tuple(content.shape)}"
    if isinstance(content, Mapping):
        shown = ", ".join(repr(name) for name in list(content)[:5])
        return f"the entries {shown}{', …' if len(content) > 5 else ''}" if content else "an empty dictionary"
    if isinstance(content, (list, tuple)):
        return f"a {type(content).__name__} of {len(content)}"
    return f"a {type(content).__name__}"
