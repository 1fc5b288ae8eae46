"""What a vision network returns, as guidance reads it.

Legend: B batch, K classes, h and w height and width of a map.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ..models.class_names import checked_class_names

OUTPUT_KINDS = ("logits", "depth")
FUNCTION = "function"  # how a function is recorded


@dataclass(init=False)
class NetworkOutput(ModelOutput):
    """
    The output of a network that is not one of transformers.

    Args:
        logits (`torch.Tensor` of shape (B, K) or (B, K, h, w), *optional*): Of classes, of images or of pixels.
        predicted_depth (`torch.Tensor` of shape (B, h, w), *optional*): Depth maps.
        others (`torch.Tensor` of shape (B, …)): What else the network returns, under any names.
    """

    logits: torch.Tensor | None = None
    predicted_depth: torch.Tensor | None = None

    def __init__(
        self, logits: torch.Tensor | None = None, predicted_depth: torch.Tensor | None = None, **others: torch.Tensor
    ):
        for name, tensor in ({"logits": logits, "predicted_depth": predicted_depth} | others).items():
            if tensor is not None:
                self[name] = tensor


def check_output_kind(outputs: Any) -> None:
    """
    Check what is said of a network's output.

    Args:
        outputs: None, 'logits', 'depth' or a function; see [`read_output`].

    Raises:
        ValueError: if it is none of them.
    """
    if outputs is not None and not callable(outputs) and outputs not in OUTPUT_KINDS:
        raise ValueError(
            f"Expected `outputs` to be one of {', '.join(OUTPUT_KINDS)}, a function of what the network returns, or None for "
            f"a network of transformers, but got {outputs!r}."
        )


def read_output(returned: Any, outputs: "str | Callable[[Any], Any] | None", batch_size: int) -> ModelOutput:
    """
    Read what a network returned.

    Args:
        returned: What the network returned for B images.
        outputs: What that is. None: a `ModelOutput`, as the networks of transformers return it. 'logits': a tensor of shape
            (B, K) or (B, K, h, w). 'depth': a tensor of shape (B, h, w) or (B, 1, h, w). A function: it takes what the network
            returned, and returns a `ModelOutput`, a dict of tensors by name, or a tensor of logits.
        batch_size (`int`): B.

    Returns:
        `ModelOutput`: With `logits`, `predicted_depth`, or what the function returned.

    Raises:
        ValueError: if the network returned something else.
    """
    if outputs == "depth":
        _check_tensor("depth", returned, batch_size, "(B, h, w) or (B, 1, h, w)")
        if returned.ndim == 4 and returned.shape[1] == 1:
            returned = returned[:, 0]
        if returned.ndim != 3:
            raise _other_shape("depth", returned, batch_size, "(B, h, w) or (B, 1, h, w)")
        return NetworkOutput(predicted_depth=returned)
    if outputs == "logits":
        return _logits(returned, batch_size)
    if outputs is None:
        if isinstance(returned, ModelOutput):
            return returned
        raise ValueError(
            "Expected the network to return a `ModelOutput`, as those of transformers do, or `outputs` to say what it returns "
            f"({', '.join(OUTPUT_KINDS)}, or a function), but got {_described(returned)}."
        )
    assert callable(outputs)  # for type checkers: see `check_output_kind`
    named = outputs(returned)
    if not isinstance(named, Mapping):
        return _logits(named, batch_size)
    is_output = isinstance(named, ModelOutput)  # which may hold more than tensors
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor) or not is_output:
            _check_tensor(name, tensor, batch_size, "(B, …)")
    return named if is_output else NetworkOutput(**named)


def _logits(logits: Any, batch_size: int) -> NetworkOutput:
    """Logits of images or of pixels."""
    shapes = "(B, K) or (B, K, h, w)"
    _check_tensor("logits", logits, batch_size, shapes)
    if logits.ndim not in (2, 4):
        raise _other_shape("logits", logits, batch_size, shapes)
    return NetworkOutput(logits=logits)


def _check_tensor(name: str, tensor: Any, batch_size: int, shapes: str) -> None:
    """Refuse what is no tensor of floating-point numbers for B images."""
    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.is_floating_point()
        or tuple(tensor.shape[:1]) != (batch_size,)
    ):
        raise _other_shape(name, tensor, batch_size, shapes)


def _other_shape(name: str, found: Any, batch_size: int, shapes: str) -> ValueError:
    return ValueError(
        f"Expected the network's {name} for {batch_size} images to be a floating-point tensor of shape {shapes}, but got "
        f"{_described(found)}; `outputs` says what the network returns, and may be a function of it."
    )


def _described(found: Any) -> str:
    """A tensor by its shape, a collection by what is in it, anything else by its class."""
    if isinstance(found, torch.Tensor):
        kind = "" if found.is_floating_point() else f" of {found.dtype}"
        return f"the shape {tuple(found.shape)}{kind}"
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} of {', '.join(map(repr, found))}"
    if isinstance(found, (list, tuple)):
        return f"a {type(found).__name__} of {len(found)} ({', '.join(type(each).__name__ for each in found)})"
    return f"a {type(found).__name__}"


def described_network(
    network: Any,
    id2label: "Mapping[Any, str] | Sequence[str] | None",
    outputs: "str | Callable[[Any], Any] | None" = None,
) -> tuple[PreTrainedConfig, dict[int, str] | None]:
    """
    Describe a network as targets read it: what classes it has.

    Args:
        network (`nn.Module`): The network.
        id2label (`Mapping` or a list of `str`, *optional*): The names of its classes. By default those in the configuration
            that a network of transformers has.
        outputs: See [`read_output`].

    Returns:
        The network's own configuration, with its class in `architectures` where that says what it returns, or one with these
        names: no class where they are not known. And the names that were given, by index.

    Raises:
        ValueError: if the names are not given by index.
    """
    config = getattr(network, "config", None)
    if id2label is None:
        if not isinstance(config, PreTrainedConfig):
            return PreTrainedConfig(id2label={}), None
        config = copy.copy(config)
        config.architectures = [type(network).__name__] if outputs is None else None  # targets read what its output is
        return config, None
    if isinstance(id2label, str) or not isinstance(id2label, (Mapping, Sequence)):
        raise ValueError(f"Expected `id2label` to be names by index, or a list of names, but got {id2label!r}.")
    names = checked_class_names(id2label if isinstance(id2label, Mapping) else dict(enumerate(id2label)))
    return PreTrainedConfig(id2label=names), names
