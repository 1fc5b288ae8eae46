"""DTR: a DiT whose channels are routed by timestep, without parameters of its own.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..saving.naming import PACKAGE
from .channel_routing import ChannelRouting, ChannelWindow, is_bound_by_memory, split_channels
from .compiled_modules import is_compiled_in_place
from .configuration import extends_arguments
from .dit.layers import DiTBlock
from .dit.model import DiTModel


class DTRBlock(DiTBlock):
    """A DiT block that reads the active channels only; the other channels bypass it. Arguments as for [`DiTBlock`]."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        *routing: torch.Tensor,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Apply the block to the active channels.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): The tokens.
            conditioning (`torch.Tensor` of shape (B, D)): The sum of timestep and label embeddings.
            routing (two `torch.Tensor` of shape (B, 1, D) or (1, 1, D), *optional*): m, 1 for active channels, and 1 - m. Without
                them, all channels are active.
            modulation (`torch.Tensor` of shape (6, B, 1, D), *optional*): See [`DiTBlock.forward`].

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        if not routing:
            return super().forward(hidden_states, conditioning, modulation=modulation)
        read, bypass = split_channels(hidden_states, *routing)
        return bypass.join(super().forward(read, conditioning, modulation=modulation), in_place=True)


class DTRTransformer2DModel(DiTModel):
    """
    DiT with Denoising Task Routing (https://arxiv.org/abs/2310.07138).

    At every timestep a window of channels is active, the same in all blocks. With `sharing_ratio=1` all channels always
    are, and the model is the plain DiT.

    Args:
        sharing_ratio (`float`): The share β in (0, 1] of channels that are active.
        routing_alpha (`float`): α > 0. With larger values, the windows of timesteps with little noise lie closer together.
        routing (`str`): 'window', or 'random' for the paper's baseline.
        parent_arguments: The arguments of [`DiTModel`], which come first in the signature.

    Raises:
        ValueError: as [`DiTModel`] and [`ChannelRouting`] do.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _no_split_modules = ["DTRBlock"]
    _repeated_blocks = ["DTRBlock"]

    @register_to_config
    @extends_arguments(DiTModel)
    def __init__(
        self,
        *,
        sharing_ratio: float = 0.8,
        routing_alpha: float = 4.0,
        routing: str = "window",
        **parent_arguments: Any,
    ):
        super().__init__(**parent_arguments)
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        self.task_routing = ChannelRouting(dim, sharing_ratio, routing_alpha, self.config.num_train_timesteps, routing)

    def make_block(self, *sizes: Any) -> DTRBlock:
        """See [`DiTModel.make_block`]."""
        return DTRBlock(*sizes)

    def choose(self, timestep: torch.Tensor) -> tuple:
        """
        Look up the window of a batch that shares its timestep; see [`DiTModel.choose`].

        Returns:
            `tuple`: A [`ChannelWindow`]. Empty where the channels are masked: with timesteps of each sample or on an accelerator,
            with gradients, in compiled models, and with hooks on blocks, which would not see the inactive channels.
        """
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or is_traced or self.is_compiled or len(timestep) != 1 or not timestep.is_cpu:
            return ()
        if not all(map(_is_plain, self.transformer_blocks)):
            return ()
        window = self.task_routing.window_at(timestep.item())
        return () if window is None else (window,)

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype, *chosen: Any) -> tuple:
        """See [`DiTModel.block_inputs`]; the two inputs are those of [`DTRBlock`], or the chosen window is the only one."""
        if chosen:
            return chosen
        active = self.task_routing(timestep)[:, None]  # (B, 1, D), or (1, 1, D) for a batch that shares its timestep
        return active.to(dtype), (~active).to(dtype)

    def _apply_blocks(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        block_inputs: tuple,
        modulations: torch.Tensor | None,
    ) -> torch.Tensor:
        first, *_ = block_inputs
        if not isinstance(first, ChannelWindow):
            return super()._apply_blocks(hidden_states, conditioning, block_inputs, modulations)
        if hidden_states.is_cpu or is_bound_by_memory(hidden_states):
            return _apply_by_slices(self._blocks_with(modulations), hidden_states, conditioning, first)
        return super()._apply_blocks(hidden_states, conditioning, first.masks_for(hidden_states), modulations)


def _apply_by_slices(
    blocks: Iterable[tuple[nn.Module, dict[str, Any]]],
    hidden_states: torch.Tensor,
    conditioning: torch.Tensor,
    window: ChannelWindow,
) -> torch.Tensor:
    """Apply blocks with the inactive channels outside of the tokens, where they add up until the end."""
    hidden_states = hidden_states.clone()  # a hook may have stored what the patch embedding returned
    sums = [torch.zeros_like(part) for part in window.inactive_of(hidden_states)]
    for block, own in blocks:
        # x ← block(m ⊙ x) + (1 - m) ⊙ x, the same additions as with masks
        for total, part in zip(sums, window.inactive_of(hidden_states)):
            total.add_(part)
            part.zero_()
        hidden_states = block(hidden_states, conditioning, **own)
    for total, part in zip(sums, window.inactive_of(hidden_states)):
        part.add_(total)
    return hidden_states


def _is_plain(block: nn.Module) -> bool:
    """Whether nobody else sees what a block is called with and returns, as plugins, caches and offloading do."""
    # private attributes of PyTorch, which offers no public ones
    hooks = block._forward_hooks or block._forward_pre_hooks or _has_any_global_hook()
    is_surrounded = "forward" in vars(block) or is_compiled_in_place(block)
    return type(block) is DTRBlock and not hooks and not is_surrounded
