"""Batches whose samples belong to several experts: split the arguments of a denoiser by expert, and join the outputs.

So an expert is only ever called with samples of its own, whatever its layers do with a batch.

Legend: B batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..intervals import group_by_expert

SHARED = frozenset({"freqs_cis", "image_rotary_emb", "img_ids", "txt_ids"})  # positions, without a batch dimension


def run_by_expert(
    experts: list[int], args: tuple, kwargs: Mapping[str, Any], run: Callable[[int, tuple, dict[str, Any]], Any]
) -> Any:
    """
    Call each expert once with its samples, and put the outputs in the order of the batch.

    Args:
        experts (`list[int]` of length B): The expert of each sample.
        args, kwargs: The arguments of the call.
        run (`Callable[[int, tuple, dict], Any]`): Calls an expert with the arguments for its samples.

    Returns:
        The output for the batch, of the kind that the experts return: a tensor, a tuple or list, or a `BaseOutput`.

    Raises:
        ValueError: if an output holds anything that is not one value for each sample.
    """
    calls, order = split_by_expert(experts, args, kwargs)
    return join_outputs([run(*call) for call in calls], order)


def split_by_expert(
    experts: list[int], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[list[tuple[int, tuple, dict[str, Any]]], torch.Tensor]:
    """
    Split the arguments of a call by expert.

    Args:
        experts (`list[int]` of length B): The expert of each sample.
        args, kwargs: The arguments of the call.

    Returns:
        Each expert that occurs, with the arguments for its samples; and the order in which [`join_outputs`] takes the samples.
    """
    order, present, sizes = group_by_expert(torch.tensor(experts))
    groups = [group.tolist() for group in order.split(sizes)]
    calls = [
        (expert, _take(args, group, len(experts)), _take(dict(kwargs), group, len(experts)))
        for expert, group in zip(present, groups)
    ]
    return calls, order.argsort()


def _take(value: Any, indices: list[int], batch_size: int) -> Any:
    """Take some samples of an argument: of a tensor or list with an entry for each sample, or of all that a container holds."""
    if isinstance(value, torch.Tensor):
        is_batch = value.ndim > 0 and len(value) == batch_size
        return value[torch.tensor(indices, device=value.device)] if is_batch else value
    if isinstance(value, Mapping):
        return {name: part if name in SHARED else _take(part, indices, batch_size) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = list(value)
        if isinstance(value, list) and len(parts) == batch_size and not _holds_batches(parts, batch_size):
            return [parts[index] for index in indices]
        return type(value)(_take(part, indices, batch_size) for part in parts)
    return value


def _holds_batches(parts: list[Any], batch_size: int) -> bool:
    """Whether a list as long as the batch holds something else than samples: tensors of a whole batch, as ControlNets return."""
    tokens = [part for part in parts if isinstance(part, torch.Tensor)]
    return len(tokens) == len(parts) and all(part.ndim == 3 and len(part) == batch_size for part in tokens)


def join_outputs(outputs: list[Any], order: torch.Tensor) -> Any:
    """
    Join the outputs of several calls along the batch, and bring the samples into an order.

    Raises:
        ValueError: if an output holds anything that is not one value for each sample.
    """
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(outputs)[order.to(first.device)]
    if isinstance(first, BaseOutput):
        return type(first)(**{name: join_outputs([output[name] for output in outputs], order) for name in first})
    if isinstance(first, list):  # a list of samples, as of Z-Image
        samples = [sample for output in outputs for sample in output]
        return [samples[index] for index in order.tolist()]
    if isinstance(first, tuple):
        return tuple(join_outputs(list(parts), order) for parts in zip(*outputs))
    if first is None:
        return None
    raise ValueError(f"Expected a denoiser to return tensors, but got a {type(first).__name__}.")
