"""Batches whose samples belong to several experts: split the arguments of a denoiser by expert, and join the outputs.

So an expert is only ever called with samples of its own, whatever its layers do with a batch.

Legend: B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..intervals import group_by_expert
from .inputs import to_device

# Arguments without a batch dimension, which may be as long as the batch by chance: positions, and settings of layers.
SHARED = frozenset(
    {
        "control_hidden_states_scale",
        "freqs_cis",
        "image_rotary_emb",
        "img_ids",
        "rope_interpolation_scale",
        "rotary_embedding",
        "scale_factor",
        "skip_layers",
        "spatio_temporal_guidance_blocks",
        "text_rope_pos",
        "txt_ids",
        "visual_rope_pos",
    }
)
_LAYERS_FIRST = frozenset({"encoder_hidden_states_llama3"})  # HiDream's: an entry for each layer, then the batch
# Parts of the names of lists with an entry for each layer or adapter: what ControlNets and IP-Adapters add.
_LISTS_OF_BATCHES = ("block", "image_embeds")


def run_by_expert(
    experts: list[int],
    args: tuple,
    kwargs: Mapping[str, Any],
    run: Callable[[int, tuple, dict[str, Any]], Any],
    names: Sequence[str] = (),
) -> Any:
    """
    Call each expert once with its samples, and put the outputs in the order of the batch.

    Args:
        experts (`list[int]` of length B): The expert of each sample.
        args, kwargs: The arguments of the call.
        run (`Callable[[int, tuple, dict], Any]`): Calls an expert with the arguments for its samples.
        names (`Sequence[str]`): The names of `args`: some arguments have no batch dimension.

    Returns:
        The output for the batch, of the kind that the experts return: a tensor, a tuple or list, or a `BaseOutput`.

    Raises:
        ValueError: if an output holds anything that is not one value for each sample.
    """
    calls, order = split_by_expert(experts, args, kwargs, names)
    return join_outputs([run(*call) for call in calls], order)


def split_by_expert(
    experts: list[int], args: tuple, kwargs: Mapping[str, Any], names: Sequence[str] = ()
) -> tuple[list[tuple[int, tuple, dict[str, Any]]], torch.Tensor]:
    """
    Split the arguments of a call by expert.

    Args:
        experts (`list[int]` of length B): The expert of each sample.
        args, kwargs, names: As in [`run_by_expert`].

    Returns:
        Each expert that occurs, with the arguments for its samples; and the order in which [`join_outputs`] takes the samples.
    """
    order, present, sizes = group_by_expert(torch.tensor(experts))
    named = [*zip_longest(args, names[: len(args)], fillvalue="")]
    calls = []
    for expert, group in zip(present, order.split(sizes)):
        indices = group.tolist()
        taken = tuple(take_samples(value, indices, len(experts), name) for value, name in named)
        calls.append((expert, taken, take_samples(dict(kwargs), indices, len(experts))))
    return calls, order.argsort()


def take_samples(value: Any, indices: list[int], batch_size: int, name: str = "") -> Any:
    """
    Take some samples of an argument: of a tensor or list with an entry for each sample, or of all that a container holds.

    Args:
        value: The argument, such as a dictionary of arguments.
        indices (`list[int]`): Which samples of the batch.
        batch_size (`int`): B.
        name (`str`): The argument's name: some have no batch dimension.
    """
    if name in SHARED:
        return value
    if isinstance(value, torch.Tensor):
        if name in _LAYERS_FIRST:
            return value[:, to_device(torch.tensor(indices), value.device)]
        is_batch = value.ndim > 0 and len(value) == batch_size
        return value[to_device(torch.tensor(indices), value.device)] if is_batch else value
    if isinstance(value, Mapping):
        return {key: take_samples(part, indices, batch_size, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        if isinstance(value, list) and len(value) == batch_size and not _holds_batches(value, batch_size, name):
            return [value[index] for index in indices]
        return type(value)(take_samples(part, indices, batch_size) for part in value)
    return value


def _holds_batches(parts: list[Any], batch_size: int, name: str) -> bool:
    """Whether a list as long as the batch holds something else than samples: tensors of a whole batch, as ControlNets return."""
    if any(part in name for part in _LISTS_OF_BATCHES):
        return True
    return all(isinstance(part, torch.Tensor) and part.ndim == 3 and len(part) == batch_size for part in parts)


def join_outputs(outputs: list[Any], order: torch.Tensor) -> Any:
    """
    Join the outputs of several calls along the batch, and bring the samples into an order.

    Raises:
        ValueError: if an output holds anything that is not one value for each sample.
    """
    first = outputs[0]
    if isinstance(first, torch.Tensor) and first.ndim > 0:
        return torch.cat(outputs)[to_device(order, first.device)]
    if isinstance(first, BaseOutput):
        return type(first)(**{name: join_outputs([output[name] for output in outputs], order) for name in first})
    if isinstance(first, list):  # a list of samples, as of Z-Image
        samples = [sample for output in outputs for sample in output]
        return [samples[index] for index in order.tolist()]
    if isinstance(first, tuple):
        return tuple(join_outputs(list(parts), order) for parts in zip(*outputs))
    if first is None:
        return None
    kind = "one value for all samples" if isinstance(first, torch.Tensor) else f"a {type(first).__name__}"
    raise ValueError(f"Expected a denoiser to return tensors with an entry for each sample, but got {kind}.")
