"""How a patch gets into a transformer: PyTorch's own hooks, and what one of them hands to the next.

Legend: B batch, N image tokens, M prompts, D width.
"""

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .blocks import layout_of
from .gate_cache import KeptGates

if TYPE_CHECKING:
    from .prompts import PromptGates, PromptPatch


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

    attaches_a_patch = True

    def __init__(self, patch: "PromptPatch", transformer: nn.Module):
        layout = layout_of(transformer)
        if patch.config.mode == "prepend" and layout.time_conditioning is None:
            name = type(transformer).__name__
            raise ValueError(f"Expected a transformer that can take extra tokens to prepend to, but got a {name}.")
        self.conditioning = layout.conditioning if patch.config.mode == "add" else layout.time_conditioning
        self.argument_names = _argument_names(type(transformer))
        blocks = _submodule(transformer, layout.blocks)
        _check_fit(patch, transformer, layout, len(blocks))
        self.embedder = _submodule(transformer, self.conditioning.embedder)
        observed = _submodule(transformer, self.conditioning.observed)
        for name in layout.depends_on:
            _check_name("depends_on", name, self.argument_names, transformer)
        block_arguments = _argument_names(type(blocks[0]))
        _check_name("image_tokens", layout.image_tokens, block_arguments, blocks[0])
        self.token_position = block_arguments.index(layout.image_tokens)
        self.patch = patch
        self.transformer = transformer
        self.layout = layout
        self._end_pass()
        self.checkpointed = WeakTensorKeyDictionary()  # gates by a block's input, for when the block is computed again
        self.kept = KeptGates()

        self.frozen = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        transformer.requires_grad_(False)
        self.handles = [
            transformer.register_forward_pre_hook(self._before_transformer, with_kwargs=True),
            *(
                block.register_forward_pre_hook(partial(self._before_block, index), with_kwargs=True)
                for index, block in enumerate(blocks[: patch.config.depth])
            ),
            # also where the pass breaks off, so that it does not seem under way
            transformer.register_forward_hook(self._after_transformer, always_call=True),
        ]
        if patch.config.gate != "none":
            self.handles.append(observed.register_forward_hook(self._after_embedder))
        if patch.config.mode == "prepend":
            self.handles.append(blocks[-1].register_forward_hook(self._after_last_block))
        torch.compiler.reset()  # compiled code looks at weights, but not at hooks that come and go

    def remove(self) -> None:
        """Leave the transformer as it was."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.frozen:
            if not parameter.is_inference():  # those can never want gradients again
                parameter.requires_grad_(True)
        torch.compiler.reset()

    def _end_pass(self) -> None:
        self.inputs: dict[str, Any] = {}  # the arguments of the forward pass under way
        self.gates: PromptGates | None = None  # and what its conditioning came to

    def _before_transformer(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._end_pass()
        self.inputs = dict(zip(self.argument_names, args)) | kwargs

    def _after_embedder(self, observed: nn.Module, args: tuple, output: Any) -> None:
        conditioning = self.conditioning.read(self.embedder, output, self.inputs)
        self._follow(conditioning)
        # embedders in training mode drop labels at random
        changing = self.patch.training or self.embedder.training or torch.is_grad_enabled()
        if changing or torch.compiler.is_compiling():
            self.gates = self.patch(conditioning)
        else:
            self.gates = self.kept(
                [self.inputs.get(name) for name in self.layout.depends_on],
                [*self.embedder.parameters(), *self.patch.parameters()],
                conditioning.device.type,
                partial(self.patch, conditioning),
            )

    def _before_block(self, index: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Prompts of block `index` into the image tokens, which come by position or by name."""
        by_name = len(args) <= self.token_position
        hidden_states = kwargs[self.layout.image_tokens] if by_name else args[self.token_position]
        if index == 0:
            self._follow(hidden_states)
            self._check_tokens(hidden_states)
        gates = None if self.patch.config.gate == "none" else self._gates_for(block, hidden_states).gates
        hidden_states = self.patch.insert(hidden_states, index, gates)
        if by_name:
            return args, kwargs | {self.layout.image_tokens: hidden_states}
        return (*args[: self.token_position], hidden_states, *args[self.token_position + 1 :]), kwargs

    def _after_last_block(self, block: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, self.patch.config.num_prompts :]

    def _after_transformer(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        gates = self.gates
        self._end_pass()
        if gates is None or gates.importance_loss is None or output is None:  # None where the pass broke off
            return output
        losses = {name: gates[name] for name in ("importance_loss", "load_loss") if name in gates}
        return _joined(output, losses)

    def _gates_for(self, block: nn.Module, hidden_states: torch.Tensor) -> "PromptGates":
        """
        The gates of the forward pass that a block's input belongs to: of the one under way, or, where gradient
        checkpointing computes a block again in the backward pass, of the one in which the block was computed first.
        """
        compiled_alone = block._compiled_call_impl is not None
        if compiled_alone:
            looked_up = getattr(self.transformer, "gradient_checkpointing", False)
        else:  # in a graph of the whole transformer nothing is computed again
            looked_up = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gates = self._looked_up(hidden_states) if looked_up else self.gates
        if gates is None:
            raise ValueError(
                "Expected a patched block to be called by its transformer, or again by gradient checkpointing without "
                "`use_reentrant`, but got a call from elsewhere."
            )
        return gates

    @torch.compiler.disable
    def _looked_up(self, hidden_states: torch.Tensor) -> "PromptGates | None":
        if self.gates is not None:
            self.checkpointed[hidden_states] = self.gates
        return self.checkpointed.get(hidden_states)

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
        lasting = ("patch", "transformer", "layout", "conditioning", "argument_names", "embedder", "token_position",
                   "frozen", "handles")  # fmt: skip
        return {name: getattr(self, name) for name in lasting}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._end_pass()
        self.checkpointed = WeakTensorKeyDictionary()
        self.kept = KeptGates()
        # a patch is copied without its transformer, but not the other way about
        self.patch._attachment = self


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The transformer itself, where `torch.compile` has wrapped it."""
    return transformer._orig_mod if is_compiled_module(transformer) else transformer


def patch_of(transformer: nn.Module) -> "PromptPatch | None":
    """The patch that a transformer has, if it has one."""
    attachment = attachment_of(unwrapped(transformer))
    return None if attachment is None else attachment.patch


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """What patches a transformer."""
    owners = (getattr(hook, "__self__", None) for hook in transformer._forward_hooks.values())
    # by a mark, not by class: see naming.py
    return next((owner for owner in owners if getattr(owner, "attaches_a_patch", False)), None)


def _joined(output: "BaseOutput | tuple", losses: dict[str, torch.Tensor]) -> "BaseOutput | tuple":
    if isinstance(output, BaseOutput):
        for name, loss in losses.items():
            output[name] = loss
        return output
    if isinstance(output, tuple):
        return (*output, *losses.values())
    raise ValueError(f"Expected the transformer to return a BaseOutput or a tuple, but got a {type(output).__name__}.")


def _argument_names(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]  # without self


def _submodule(transformer: nn.Module, name: str) -> nn.Module:
    try:
        return transformer.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"Expected the layout of {type(transformer).__name__} to name modules that it has, but got {name!r}."
        ) from error


def _check_name(what: str, name: str, valid: list[str], module: nn.Module) -> None:
    if name not in valid:
        raise ValueError(
            f"Expected `{what}` to name arguments of {type(module).__name__}'s `forward`, {', '.join(valid)}, "
            f"but got {name!r}."
        )


def _check_fit(patch: "PromptPatch", transformer: nn.Module, layout, num_blocks: int) -> None:
    config, name = patch.config, type(transformer).__name__
    if attachment_of(transformer) is not None:
        raise ValueError(f"Expected a {name} without a patch, but got one that has one; `detach()` that one first.")
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
