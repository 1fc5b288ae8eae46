"""How a patch gets into a transformer: PyTorch's own hooks, and what one of them hands to the next.

Legend: B batch, N image tokens, M prompts, D width.
"""

import inspect
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..caching import tensor_state
from .layouts import layout_of

if TYPE_CHECKING:
    from .prompts import PromptPatch

MAX_KEPT_GATES = 256  # a sampling run of 250 steps, the published number, finds its gates again


class Attachment:
    """
    A patch at work in a transformer.

    In a forward pass the conditioning is read when it is there and becomes the gates of all blocks; before each block its
    prompts are inserted; the losses join the transformer's output.

    Args:
        patch ([`PromptPatch`]): What to attach.
        transformer (`nn.Module`): To what. Its parameters are frozen until [`remove`].

    Raises:
        ValueError: if they do not fit; see [`PromptPatch.attach`].
    """

    def __init__(self, patch: "PromptPatch", transformer: nn.Module):
        layout = layout_of(transformer)
        blocks = transformer.get_submodule(layout.blocks)
        _check_fit(patch, transformer, layout, len(blocks))
        self.patch = patch
        self.transformer = transformer
        self.layout = layout
        self.conditioning = layout.conditioning if patch.config.mode == "add" else layout.time_conditioning
        self.argument_names = _argument_names(type(transformer))
        self.embedder = transformer.get_submodule(self.conditioning.embedder)
        self.token_position = _argument_names(type(blocks[0])).index(layout.image_tokens)
        self._forget_pass()
        self.forget()

        self.frozen = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
        transformer.requires_grad_(False)
        self.handles = [
            transformer.register_forward_pre_hook(self._before_transformer, with_kwargs=True),
            *(
                block.register_forward_pre_hook(partial(self._before_block, index), with_kwargs=True)
                for index, block in enumerate(blocks[: patch.config.depth])
            ),
            transformer.register_forward_hook(self._after_transformer),
        ]
        if patch.config.gate != "none":
            observed = transformer.get_submodule(self.conditioning.observed)
            self.handles.append(observed.register_forward_hook(self._after_embedder))
        if patch.config.mode == "prepend":
            self.handles.append(blocks[-1].register_forward_hook(self._after_last_block))
        torch.compiler.reset()  # compiled code looks at weights, but not at hooks that come and go

    def remove(self) -> None:
        """Leave the transformer as it was."""
        for handle in self.handles:
            handle.remove()
        for name in self.frozen:
            self.transformer.get_parameter(name).requires_grad_(True)
        torch.compiler.reset()

    def forget(self) -> None:
        """Drop the gates that are kept while sampling."""
        self.kept_gates, self.kept_state, self.kept_tensors = OrderedDict(), None, None

    def _forget_pass(self) -> None:
        self.inputs: dict[str, Any] = {}  # the arguments of the forward pass under way
        self.gates = None  # and what its conditioning came to
        self.checkpointed = WeakTensorKeyDictionary()  # by a block's input, for when the block is computed again

    def _before_transformer(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs = dict(zip(self.argument_names, args)) | kwargs
        self.gates = None

    def _after_embedder(self, observed: nn.Module, args: tuple, output: Any) -> None:
        conditioning = self.conditioning.read(self.embedder, output, self.inputs)
        self._follow(conditioning)
        if self.patch.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.gates = self.patch(conditioning)
        else:
            self.gates = self._kept(conditioning)

    def _before_block(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Prompts of block `index` into the image tokens, which come by position or by name."""
        by_name = len(args) <= self.token_position
        hidden_states = kwargs[self.layout.image_tokens] if by_name else args[self.token_position]
        if index == 0:
            self._follow(hidden_states)
            self._check_tokens(hidden_states)
        gates = self._gates_for(hidden_states)
        hidden_states = self.patch.insert(hidden_states, index, None if gates is None else gates.gates)
        if by_name:
            return args, kwargs | {self.layout.image_tokens: hidden_states}
        return (*args[: self.token_position], hidden_states, *args[self.token_position + 1 :]), kwargs

    def _after_last_block(self, block: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, self.patch.config.num_prompts :]

    def _after_transformer(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        gates, self.gates, self.inputs = self.gates, None, {}
        if gates is None or gates.importance_loss is None:
            return output
        losses = {name: gates[name] for name in ("importance_loss", "load_loss") if name in gates}
        if isinstance(output, tuple):
            return (*output, *losses.values())
        return _joined(output, losses)

    def _gates_for(self, hidden_states: torch.Tensor):
        """
        The gates of the forward pass that `hidden_states` belong to: of the one under way, or, where gradient
        checkpointing computes a block again in the backward pass, of the one in which the block was computed first.
        """
        if torch.compiler.is_compiling() or not getattr(self.transformer, "gradient_checkpointing", False):
            return self.gates
        if hidden_states not in self.checkpointed:
            self.checkpointed[hidden_states] = self.gates
        return self.checkpointed[hidden_states]

    def _kept(self, conditioning: torch.Tensor):
        """The gates, computed unless they are kept for these timesteps and labels."""
        tensors = [*self.embedder.parameters(), *self.patch.parameters()]
        state = [tensor_state(tensor) for tensor in tensors]
        if state != self.kept_state:
            self.forget()
            self.kept_state, self.kept_tensors = state, tensors  # alive, they are the only ones with their ids
        key, tensors = _key([self.inputs.get(name) for name in self.layout.depends_on])
        if key is None:
            return self.patch(conditioning)
        if key not in self.kept_gates:
            self.kept_gates[key] = self.patch(conditioning), tensors
            if len(self.kept_gates) > MAX_KEPT_GATES:
                self.kept_gates.popitem(last=False)
        self.kept_gates.move_to_end(key)
        return self.kept_gates[key][0]

    def _follow(self, tensor: torch.Tensor) -> None:
        """A patch is where its transformer computes, which offloading and `to()` move without knowing of the patch."""
        if self.patch.prompts.device != tensor.device:
            self.patch.to(tensor.device)

    def _check_tokens(self, hidden_states: torch.Tensor) -> None:
        config = self.patch.config
        if config.mode == "add" and hidden_states.shape[1] != config.num_prompts:
            raise ValueError(
                f"Expected an image of the {config.num_prompts} tokens that the patch has prompts for, "
                f"but got {hidden_states.shape[1]}."
            )

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for transient in ("inputs", "gates", "checkpointed", "kept_gates", "kept_state", "kept_tensors"):
            del state[transient]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_pass()
        self.forget()


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The transformer itself, where `torch.compile` has wrapped it."""
    return transformer._orig_mod if is_compiled_module(transformer) else transformer


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """What patches a transformer."""
    owners = (getattr(hook, "__self__", None) for hook in transformer._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)


def _joined(output: BaseOutput, losses: dict[str, torch.Tensor]) -> BaseOutput:
    for name, loss in losses.items():
        output[name] = loss
    return output


def _argument_names(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]  # without self


def _key(inputs: list[Any]) -> tuple[tuple | None, list[torch.Tensor]]:
    """
    What stands for these inputs, without waiting for an accelerator: tensors on the CPU for their values, others for
    themselves, and those that have to be kept alive for it. None where the first of them, the timestep, is such a one:
    there is another at every step.
    """
    key, alive = [], []
    for position, value in enumerate(inputs):
        if isinstance(value, dict):
            parts, tensors = _key([None, *value.values()])
            key.append(parts)
            alive += tensors
        elif not isinstance(value, torch.Tensor):
            key.append(value)
        elif value.is_cpu:
            key.append((tuple(value.shape), *value.flatten().tolist()))
        elif position == 0:
            return None, []
        else:
            key.append(tensor_state(value))
            alive.append(value)
    return tuple(key), alive


def _check_fit(patch: "PromptPatch", transformer: nn.Module, layout, num_blocks: int) -> None:
    config, name = patch.config, type(transformer).__name__
    if attachment_of(transformer) is not None:
        raise ValueError(f"Expected a {name} without a patch, but got one that has one; `detach()` that one first.")
    if config.mode == "prepend" and layout.time_conditioning is None:
        raise ValueError(f"Expected a transformer that can take extra tokens to prepend to, but got a {name}.")
    if config.hidden_size != layout.width(transformer):
        raise ValueError(
            f"Expected the patch's `hidden_size` to be the {layout.width(transformer)} channels of the {name}, "
            f"but got {config.hidden_size}."
        )
    if config.depth > num_blocks:
        raise ValueError(
            f"Expected the patch's `depth` to be at most the {num_blocks} blocks of the {name}, but got {config.depth}."
        )
    if config.mode == "add" and config.num_prompts != layout.num_tokens(transformer):
        raise ValueError(
            f"Expected the patch's `num_prompts` to be the {layout.num_tokens(transformer)} image tokens of the {name}, "
            f"but got {config.num_prompts}."
        )
