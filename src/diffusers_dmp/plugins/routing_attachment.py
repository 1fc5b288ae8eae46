"""How a routing of channels gets into a denoiser: hooks on the denoiser, functions around its blocks, and the masks of a pass.

Legend: B batch, N tokens, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..intervals import NoiseIntervals, check_timesteps
from ..models.channel_routing import ChannelRouting, split_channels
from ..models.time_argument import ExpertFinder
from .forward_passes import ForwardPasses
from .hooks import ForwardHooks
from .streams import Block, blocks_with_streams

if TYPE_CHECKING:
    from .task_routing import TaskRouting


class RoutingAttachment:
    """
    The connection of a [`TaskRouting`] and its denoiser: hooks on the denoiser, and functions around its blocks.

    Args:
        routing ([`TaskRouting`]): The routing.
        denoiser (`nn.Module`): The denoiser.

    Raises:
        ValueError: if the two do not fit.
    """

    keeps_conditioning = True  # see `has_fixed_modulations`

    def __init__(self, routing: "TaskRouting", denoiser: nn.Module):
        blocks = blocks_with_streams(denoiser)
        routed = [block for block in blocks if any(name in block.streams for name in routing.streams)]
        self._check_streams(routing, denoiser, blocks)
        self.routing = routing
        self.denoiser = denoiser
        self.finder = ExpertFinder(denoiser, NoiseIntervals.uniform(1, routing.num_train_timesteps))
        self.is_unit_checked = False
        self.passes = ForwardPasses(denoiser)
        self.first_block = routed[0].module
        self.tables: dict[int, ChannelRouting] = {}  # by the number of channels
        for width in sorted({block.width for block in routed if block.width is not None}):
            self._add_table(width)
        self.hooks = ForwardHooks()
        self.hooks.before(denoiser, self._before_denoiser)
        # also after an exception, or else the pass would seem to be still running
        self.hooks.after(denoiser, self._after_denoiser, always_call=True)
        for block in routed:  # inside of caches, which leave out blocks and add what they have changed before
            self.hooks.around(block.module, partial(self._call_block, block, block.argument_names))

    def _before_denoiser(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.passes.begin(RoutingMasks(self.tables, self._timesteps(args, kwargs), _dtype_of(self.first_block)))

    def _after_denoiser(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self.passes.end()

    def _call_block(self, block: Block, names: list[str], forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Give a block the active channels of its streams, and add the others to what it returns."""
        streams = [block.streams[name] for name in self.routing.streams if name in block.streams]
        taken = [(stream, stream.input_of(names, args, kwargs)) for stream in streams]
        taken = [(stream, hidden_states) for stream, hidden_states in taken if hidden_states is not None]
        if not taken or self.routing.sharing_ratio == 1:
            return forward(*args, **kwargs)
        masks: RoutingMasks = self.passes.of(block.module, taken[0][1])
        split = []
        for stream, hidden_states in taken:
            width = hidden_states.shape[stream.channels]
            if width not in self.tables:
                self._add_table(width)
            read, bypass = split_channels(hidden_states, *masks.of(hidden_states, stream.channels))
            args, kwargs = stream.with_input(names, args, kwargs, read)
            split.append((stream, bypass))
        output = forward(*args, **kwargs)
        for stream, bypass in split:
            returned, taken_shape = stream.output_of(output), bypass.hidden_states.shape
            if returned is None:  # the last block ends the text
                continue
            if returned.shape != taken_shape:
                raise ValueError(
                    f"Expected the block `{block.name}` to return as many channels as it takes, {tuple(taken_shape)}, "
                    f"but got {tuple(returned.shape)}."
                )
            output = stream.with_output(output, bypass.join(returned))
        return output

    def _timesteps(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The timestep of each sample, (B,), or (1,) for a batch that shares it."""
        value = self.finder.value(args, kwargs)
        if not self.is_unit_checked and not torch.compiler.is_compiling():
            self.finder(args, kwargs)
            self.is_unit_checked = True
        if value.ndim > 0 and value.stride(0) == 0:
            value = value[:1]
        argument, total = self.finder.argument, self.routing.num_train_timesteps
        timesteps = argument.timesteps(value, total)
        if argument.at_pure_noise is not None and value.is_floating_point():
            # whole timesteps that were divided by T may come back a little smaller, and ⌊t⌋ counts
            timesteps = (timesteps + 4 * torch.finfo(torch.float32).eps * total).clamp(max=total)
        check_timesteps(timesteps, total)
        return timesteps

    @torch.compiler.disable
    def _add_table(self, width: int) -> None:
        routing = self.routing
        self.tables[width] = ChannelRouting(
            width, routing.sharing_ratio, routing.routing_alpha, routing.num_train_timesteps
        )

    @staticmethod
    def _check_streams(routing: "TaskRouting", denoiser: nn.Module, blocks: list[Block]) -> None:
        valid = sorted({name for block in blocks for name in block.streams})
        unknown = [name for name in routing.streams if name not in valid]
        if unknown:
            raise ValueError(
                f"Expected `streams` to be some of those of a {type(denoiser).__name__}, {', '.join(valid)}, but got "
                f"{', '.join(unknown)}."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # a copied denoiser has a copied routing, which is not connected to it yet
        self.routing._attachment = self


class RoutingMasks:
    """
    The masks of one forward pass.

    Args:
        tables (`dict[int, ChannelRouting]`): Which channels are active, by the number of channels.
        timesteps (`torch.Tensor` of shape (B,) or (1,)): t.
        dtype (`torch.dtype`): What the features probably have.
    """

    def __init__(self, tables: dict[int, ChannelRouting], timesteps: torch.Tensor, dtype: torch.dtype):
        self.tables = tables
        self.timesteps = timesteps
        self.dtype = dtype
        self.masks = {width: self._compute(width) for width in tables}

    def of(self, hidden_states: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the masks for some features.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D) or (B, D, h, w)): The features.
            dim (`int`): The dimension of their channels.

        Returns:
            Two `torch.Tensor` that broadcast to the features: m, 1 for active channels, and 1 - m.

        Raises:
            ValueError: if there are neither one nor B timesteps.
        """
        width, batch_size = hidden_states.shape[dim], len(hidden_states)
        if width not in self.masks:
            self.masks[width] = self._compute(width)
        active, inactive = self.masks[width]
        if len(active) not in (1, batch_size):
            raise ValueError(f"Expected one timestep or one for each of {batch_size} samples, but got {len(active)}.")
        if (active.dtype, active.device) != (hidden_states.dtype, hidden_states.device):
            active, inactive = self.masks[width] = active.to(hidden_states), inactive.to(hidden_states)
        shape = [1] * hidden_states.ndim
        shape[0], shape[dim] = len(active), width
        return active.view(shape), inactive.view(shape)

    def _compute(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.tables[width]
        if table.window_starts.device != self.timesteps.device:  # `to()` and offloading move the denoiser without it
            table.to(self.timesteps.device)
        active = table(self.timesteps)  # (B, D) or (1, D)
        return active.to(self.dtype), (~active).to(self.dtype)


def _dtype_of(block: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()), torch.float32)
