"""What a plugin computes for a forward pass, found again where gradient checkpointing computes a block again."""

from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..models.compiled_modules import is_compiled_in_place


class ForwardPasses:
    """
    Give each block what belongs to the forward pass that it is called in.

    That is the running forward pass of the model. But where gradient checkpointing computes a block again in the backward
    pass, other forward passes may have run in between: then it is the pass in which the block was computed first, found by the
    identity of the block's input.

    Args:
        model (`nn.Module`): The model that calls the blocks.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._forget()

    def _forget(self) -> None:
        self.running: Any = None
        self._checkpointed = False
        self._by_input = WeakTensorKeyDictionary()

    def begin(self, value: Any) -> None:
        """
        A forward pass begins.

        Args:
            value: What belongs to it.
        """
        self.running = value
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._checkpointed = getattr(self.model, "is_gradient_checkpointing", False)

    def end(self) -> None:
        """The forward pass has ended, or raised an exception."""
        self.running = None

    def of(self, block: nn.Module, block_input: torch.Tensor) -> Any:
        """
        Return what belongs to the forward pass that a block is called in.

        Args:
            block (`nn.Module`): The block.
            block_input (`torch.Tensor`): A tensor that the block was called with, itself.

        Raises:
            ValueError: if the block was called by something else than the model.
        """
        if is_compiled_in_place(block):
            checkpointed = self._checkpointed
        else:  # in a graph of the whole model, no block is called in the backward pass
            checkpointed = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        value = self._remembered(block_input) if checkpointed else self.running
        if value is None:
            raise ValueError(
                f"Expected a {type(block).__name__} to be called by its {type(self.model).__name__}, or again by gradient "
                "checkpointing without `use_reentrant`, but got a call from elsewhere."
            )
        return value

    @torch.compiler.disable
    def _remembered(self, block_input: torch.Tensor) -> Any:
        if self.running is not None:
            self._by_input[block_input] = self.running
        return self._by_input.get(block_input)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model = state["model"]
        self._forget()
