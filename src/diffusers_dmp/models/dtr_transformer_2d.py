"""DTR: a DiT whose channels are routed by timestep, without parameters of its own.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ..saving.naming import PACKAGE
from .channel_routing import ChannelRouting, active_channels, with_inactive_channels
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
            routing (two `torch.Tensor` of shape (B, 1, D) or (1, 1, D)): m, 1 for active channels, and 1 - m.
            modulation (`torch.Tensor` of shape (6, B, 1, D), *optional*): See [`DiTBlock.forward`].

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        active, inactive = routing
        output = super().forward(active_channels(hidden_states, active), conditioning, modulation=modulation)
        return with_inactive_channels(output, hidden_states, inactive, in_place=True)


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

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype, *chosen: Any) -> tuple:
        """See [`DiTModel.block_inputs`]; the two inputs are those of [`DTRBlock`]."""
        active = self.task_routing(timestep)[:, None]  # (B, 1, D), or (1, 1, D) for a batch that shares its timestep
        return active.to(dtype), (~active).to(dtype)
