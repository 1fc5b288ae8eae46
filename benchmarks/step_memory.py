"""The memory that a training step takes on a CUDA GPU, estimated without one.

A step is run on PyTorch's `meta` device, which has shapes and no numbers, and what autograd keeps for the backward pass is
added up:

    parameters, their gradients, AdamW's moments and averaged weights, as far as they are there
  + tensors kept for the backward pass, bfloat16 where CUDA's autocast computes in it
  + three times the largest of them, for what the backward pass computes with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusers_dmp.training.arguments import OptimisationArguments

WORKING_TENSORS = 3

# What CUDA's autocast computes in bfloat16 and in float32, as far as the models here have it:
# https://pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
IN_BFLOAT16 = {
    F.conv2d,
    F.conv3d,
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.baddbmm,
}
IN_FLOAT32 = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.exp, torch.pow}


class MetaAutocast(TorchFunctionMode):
    """CUDA's autocast and its memory-saving attention, for the `meta` device, which has neither."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args)) | kwargs
            inputs = [cast(named[name], torch.bfloat16) for name in ("query", "key", "value")]
            return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]
        if function in IN_BFLOAT16 | IN_FLOAT32:
            dtype = torch.bfloat16 if function in IN_BFLOAT16 else torch.float32
            args = tuple(cast(value, dtype) for value in args)
            kwargs = {name: cast(value, dtype) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another dtype; anything else as it is."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class KeptTensors:
    """The storages that are kept for the backward pass, each counted once."""

    def __init__(self, without: Iterator[torch.Tensor]):
        self.ignored = {tensor.untyped_storage()._cdata for tensor in without}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.ignored:
            self.storages[storage._cdata] = storage  # held, so that its identity is not another's later
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    @property
    def largest(self) -> int:
        return max((storage.nbytes() for storage in self.storages.values()), default=0)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context whose operations keep tensors."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield


@dataclass(frozen=True)
class StepMemory:
    """
    The memory of a training step, in bytes.

    Args:
        frozen (`int`): The weights that are not trained.
        learned (`int`): Those that are, with their gradients, moments and averages.
        activations (`int`): What the backward pass needs.
    """

    frozen: int
    learned: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.learned + self.activations


def step_memory(
    model: nn.Module,
    args: OptimisationArguments,
    forward: Callable[[], torch.Tensor],
    loss: Callable[[torch.Tensor], object],
) -> StepMemory:
    """
    Estimate the memory of a training step.

    Args:
        model (`nn.Module`): On the `meta` device.
        args ([`OptimisationArguments`]): For checkpointing and averaging.
        forward (`Callable`): Calls the model with a micro-batch.
        loss (`Callable`): Of what that returns, in float32.
    """
    kept, inner = KeptTensors(model.parameters()), [KeptTensors(model.parameters())]

    def checkpointed(layer: Callable, *inputs: Any) -> Any:
        for value in inputs:
            if isinstance(value, torch.Tensor):
                kept.add(value)
        inner.append(KeptTensors(model.parameters()))
        with inner[-1].recorded():
            return layer(*inputs)

    for module in model.modules():
        if args.gradient_checkpointing and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, checkpointed
    with kept.recorded():
        with MetaAutocast():
            prediction = forward()
        loss(prediction.float())
    copies = 4 + (args.ema_decay > 0)  # weights, gradients, two moments, averaged weights
    learned = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    working = WORKING_TENSORS * max(kept.largest, *(each.largest for each in inner))
    activations = kept.total + max(each.total for each in inner) + working
    return StepMemory(frozen, copies * learned, activations)
