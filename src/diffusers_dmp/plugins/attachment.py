"""How prompts get into a transformer: forward hooks, and what one hook passes on to the next.

Legend: B batch, N image tokens, M prompts, D width, L blocks that get prompts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import unwrap_module
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..models.compiled_modules import is_compiled_in_place
from ..models.time_argument import time_argument_of
from ..saving.adapters import has_adapters
from .blocks import blocks_of, check_argument, forward_argument_names, layout_of, submodule_of
from .gate_cache import GateCache
from .gating import PromptGates
from .hooks import ForwardHooks
from .layouts import TransformerLayout
from .streams import Stream

if TYPE_CHECKING:
    from .prompts import PromptPatch

NUM_TRAIN_TIMESTEPS = 1000  # of all transformers of Diffusers that are told fractions


class Attachment:
    """
    The connection of a [`PromptPatch`] and the transformer that it is attached to.

    In a forward pass, the gates of all blocks are computed as soon as the conditioning is known, the prompts of each block
    are inserted before it, and the losses are added to the transformer's output.

    Args:
        patch ([`PromptPatch`]): The prompts.
        transformer (`nn.Module`): The transformer. Its parameters are frozen until [`~Attachment.remove`].

    Raises:
        ValueError: if the two do not fit; see [`PromptPatch.attach`].
    """

    attaches_a_patch = True  # see `attachment_of`
    keeps_conditioning = True  # see `has_fixed_modulations`

    def __init__(self, patch: "PromptPatch", transformer: nn.Module):
        layout = layout_of(transformer)
        conditioning = layout.conditioning_for(transformer, patch.config.mode)
        blocks = blocks_of(transformer)
        _check_fit(patch, transformer, layout, len(blocks))
        observed = submodule_of(transformer, conditioning.observed)
        for name in layout.depends_on:
            check_argument("depends_on", name, transformer)
        check_argument("image_tokens", blocks[0].streams["image"].argument, blocks[0].module)

        self.patch = patch
        self.transformer: Any = transformer
        self.layout = layout
        self.conditioning = conditioning
        self.embedder = submodule_of(transformer, conditioning.embedder)
        self.argument_names = forward_argument_names(transformer)
        self.frozen = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        self.hooks = ForwardHooks()
        self._forget_passes()

        transformer.requires_grad_(False)
        self.hooks.before(transformer, self._before_transformer)
        for index, block in enumerate(blocks[: patch.config.depth]):
            # not one list of all streams: each block's would be compiled by itself
            stream, names = block.streams["image"], block.argument_names
            self.hooks.before(block.module, partial(self._before_block, index, stream, names))
            if patch.config.mode == "add":
                self.hooks.after(block.module, self._after_block)
        # also after an exception, or else the pass would seem to be still running
        self.hooks.after(transformer, self._after_transformer, always_call=True)
        if patch.config.gate != "none":
            self.hooks.after(observed, self._after_embedder)
        if patch.config.mode == "prepend":
            self.hooks.after(blocks[-1].module, partial(self._after_last_block, blocks[-1].streams["image"]))

    def remove(self) -> None:
        """Restore the transformer as it was before."""
        self.hooks.remove()
        for parameter in self.frozen:
            if not parameter.is_inference():  # those can never require gradients again
                parameter.requires_grad_(True)

    def gates_at(self, timesteps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Return the gates at some timesteps, found by running the transformer.

        Args:
            timesteps (`torch.Tensor` of shape (S,)): Training timesteps.
            inputs (`dict`): The other arguments of the transformer's `forward`, for one sample. By default, the image is blank.

        Returns:
            `torch.Tensor` of shape (S, L, M).
        """
        device = self.transformer.device
        if device.type == "meta":  # the weights are offloaded, and come back to the device of the inputs
            device = timesteps.device
        image = self.argument_names[0]
        inputs = inputs if image in inputs else {image: self._blank_image(device)} | inputs
        time = time_argument_of(self.transformer)
        found = []

        def collect(transformer: nn.Module, args: tuple, output: Any) -> None:
            found.append(self.gates.gates[:, 0])  # type: ignore[union-attr]

        # first of the hooks, before the pass ends
        handle = self.transformer.register_forward_hook(collect, prepend=True)
        try:
            # eagerly, as it is not worth compiling for a batch of one
            with _eval_mode(self.transformer, self.patch), torch.compiler.set_stance("force_eager"):
                for timestep in time.told(timesteps.to(device), NUM_TRAIN_TIMESTEPS):
                    self.transformer(**inputs | {time.name: timestep[None]})
        finally:
            handle.remove()
        return torch.stack(found)

    def _blank_image(self, device: torch.device) -> torch.Tensor:
        config = self.transformer.config
        if "sample_size" not in config:
            raise ValueError(
                f"Expected `{self.argument_names[0]}` among the inputs of a {type(self.transformer).__name__}, whose "
                f"configuration has no `sample_size`, but got none."
            )
        size = (1, config.in_channels, config.sample_size, config.sample_size)
        return torch.zeros(size, device=device, dtype=self.transformer.dtype)

    def _forget_passes(self) -> None:
        self._end_pass()
        self.gates_by_input = WeakTensorKeyDictionary()  # by a block's input, for gradient checkpointing
        self.gate_cache = GateCache()

    def _end_pass(self) -> None:
        self.inputs: dict[str, Any] = {}  # the arguments of the running forward pass, by name
        self.gates: PromptGates | None = None  # of the running forward pass
        self.num_image_tokens: int | None = None  # of the running forward pass, where others follow these
        self.is_prepended = False  # whether there are prompts in front of the tokens of the running forward pass
        self.tokens: tuple[torch.Tensor, torch.Tensor] | None = None  # of the running block, without prompts and with

    def _before_transformer(self, transformer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._end_pass()
        self.inputs = dict(zip(self.argument_names, args)) | kwargs
        if self.layout.num_image_tokens is not None:
            self.num_image_tokens = self.layout.num_image_tokens(self.inputs)

    def _after_embedder(self, observed: nn.Module, args: tuple, output: Any) -> None:
        if not self.inputs:  # called by itself, as for the modulations of many timesteps at once
            return
        conditioning = self.conditioning.read(self.embedder, output, self.inputs)
        self._move_patch_to(conditioning.device)
        # embedders in training mode drop labels at random
        changing = self.patch.training or self.embedder.training or torch.is_grad_enabled()
        # adapters can be switched and scaled without a change of any weight
        if changing or torch.compiler.is_compiling() or has_adapters(self.embedder):
            self.gates = self.patch(conditioning)
        else:
            self.gates = self.gate_cache.get(
                inputs=[self.inputs.get(name) for name in self.layout.depends_on],
                weights=[*self.embedder.parameters(), *self.patch.parameters()],
                device_type=conditioning.device.type,
                compute=lambda: self.patch(conditioning),
            )

    def _before_block(
        self, index: int, stream: Stream, names: list[str], block: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Insert the prompts of block `index` into its image tokens, which come by position or by name."""
        hidden_states = stream.input_of(names, args, kwargs)
        if index == 0:
            self._move_patch_to(hidden_states.device)
        if self.inputs:  # of a running pass; a block that is computed again for gradients was checked before
            self._check_tokens(index, hidden_states)
        gates = None if self.patch.config.gate == "none" else self._gates_for(block, hidden_states).gates
        inserted = self.patch.insert(hidden_states, index, gates)
        self.tokens = hidden_states, inserted
        return stream.with_input(names, args, kwargs, inserted)

    def _after_block(self, block: nn.Module, args: tuple, output: Any) -> Any:
        """Take the prompts off again where a cache skips the block: it returns the very tokens that it was given."""
        (hidden_states, inserted), self.tokens = self.tokens, None  # type: ignore[misc]
        if isinstance(output, tuple):
            return tuple(hidden_states if each is inserted else each for each in output)
        return hidden_states if output is inserted else output

    def _after_last_block(self, stream: Stream, block: nn.Module, args: tuple, output: Any) -> Any:
        return stream.with_output(output, stream.output_of(output)[:, self.patch.config.num_prompts :])

    def _after_transformer(self, transformer: nn.Module, args: tuple, output: Any) -> Any:
        gates = self.gates
        self._end_pass()
        if gates is None or gates.importance_loss is None or output is None:  # no output after an exception
            return output
        losses = {name: gates[name] for name in ("importance_loss", "load_loss") if name in gates}
        return _with_losses(output, losses)

    def _gates_for(self, block: nn.Module, hidden_states: torch.Tensor) -> PromptGates:
        """
        Return the gates of the forward pass that a block's input belongs to.

        That is the running forward pass. But where gradient checkpointing computes a block again in the backward pass, it is
        the pass in which the block was computed first, found by the identity of the input.
        """
        if is_compiled_in_place(block):
            checkpointed = getattr(self.transformer, "gradient_checkpointing", False)
        else:  # in a graph of the whole transformer, no hook runs in the backward pass
            checkpointed = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gates = self._gates_by_input(hidden_states) if checkpointed else self.gates
        if gates is None:
            raise ValueError(
                "Expected a block with prompts to be called by its transformer, or again by gradient checkpointing "
                "without `use_reentrant`, but got a call from elsewhere."
            )
        return gates

    @torch.compiler.disable
    def _gates_by_input(self, hidden_states: torch.Tensor) -> PromptGates | None:
        if self.gates is not None:
            self.gates_by_input[hidden_states] = self.gates
        return self.gates_by_input.get(hidden_states)

    def _move_patch_to(self, device: torch.device) -> None:
        """Move the prompts where the transformer computes: offloading and `to()` move it without them."""
        if self.patch.prompts.device != device:
            self.patch.to(device)

    def _check_tokens(self, index: int, hidden_states: torch.Tensor) -> None:
        if self.patch.config.mode == "prepend":
            self.is_prepended = self.is_prepended or index == 0
            if not self.is_prepended:
                raise ValueError(
                    "Expected the first block to be called, before which prompts are prepended, but got a call that skips it."
                )
            return
        expected = self.patch.config.num_prompts
        num_tokens = hidden_states.shape[1] if self.num_image_tokens is None else self.num_image_tokens
        if num_tokens != expected:
            raise ValueError(
                f"Expected an image of {expected} tokens, one for each prompt of a block, but got {num_tokens}."
            )

    def __getstate__(self) -> dict:
        passing = ("inputs", "gates", "num_image_tokens", "is_prepended", "tokens", "gates_by_input", "gate_cache")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget_passes()
        # a copied transformer has copied prompts, which are not connected to it yet
        self.patch._attachment = self


def patch_of(transformer: nn.Module) -> "PromptPatch | None":
    """Return the [`PromptPatch`] that is attached to a transformer, or None."""
    attachment = attachment_of(unwrap_module(transformer))
    return None if attachment is None else attachment.patch


def attachment_of(transformer: nn.Module) -> Attachment | None:
    """Return the [`Attachment`] of a transformer that is not wrapped by `torch.compile`, or None."""
    owners = (getattr(hook, "__self__", None) for hook in transformer._forward_hooks.values())
    # by an attribute, as code that comes with a repository defines another class `Attachment`: see saving/naming.py
    return next((owner for owner in owners if getattr(owner, "attaches_a_patch", False)), None)


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and each of their modules back into its own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _with_losses(output: "BaseOutput | tuple", losses: dict[str, torch.Tensor]) -> "BaseOutput | tuple":
    if isinstance(output, BaseOutput):
        for name, loss in losses.items():
            output[name] = loss
        return output
    if isinstance(output, tuple):
        return (*output, *losses.values())
    raise ValueError(f"Expected the transformer to return a BaseOutput or a tuple, but got a {type(output).__name__}.")


def _check_fit(patch: "PromptPatch", transformer: nn.Module, layout: TransformerLayout, num_blocks: int) -> None:
    config, name = patch.config, type(transformer).__name__
    if attachment_of(transformer) is not None:
        raise ValueError(f"Expected a {name} without prompts, but got one that has some; `detach()` those first.")
    if config.hidden_size != layout.width(transformer):
        raise ValueError(
            f"Expected the prompts' `hidden_size` to be the {layout.width(transformer)} channels of the {name}, "
            f"but got {config.hidden_size}."
        )
    if config.depth > num_blocks:
        raise ValueError(
            f"Expected the prompts' `depth` to be at most the {num_blocks} blocks of the {name}, but got {config.depth}."
        )
    conditioning_width = layout.conditioning_width(transformer, config.mode)
    if config.gate != "none" and (config.conditioning_size or config.hidden_size) != conditioning_width:
        raise ValueError(
            f"Expected the prompts' `conditioning_size` to be the {conditioning_width} channels of what conditions the "
            f"{name}, but got {config.conditioning_size or config.hidden_size}."
        )
    num_tokens = None if layout.any_size else layout.num_tokens(transformer)
    if config.mode == "add" and num_tokens not in (None, config.num_prompts):
        raise ValueError(
            f"Expected `num_prompts` to be the {num_tokens} image tokens of the {name}, but got {config.num_prompts}."
        )
