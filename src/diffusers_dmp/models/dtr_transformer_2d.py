"""DTR: a DiT whose channels are routed by timestep, without parameters of its own.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width, T training timesteps. In the paper's words, a task is to denoise at one timestep.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..saving.naming import PACKAGE
from .configuration import extends_arguments
from .dit.layers import DiTBlock
from .dit.model import DiTModel


class TaskRouting(nn.Module):
    """
    Decide which channels are active at a timestep: its mask m_t has n = ⌊D·β⌋ ones among D channels (DTR, section 4.1).

    With `routing="window"` the active channels are contiguous, and the window moves from the first channels (almost no
    noise) to the last (almost pure noise), so that near timesteps share most of their channels. Only the T first channels
    of the windows are stored. With `routing="random"`, the paper's baseline, any channels are active, and the table of
    masks is saved with the weights.

    Args:
        dim (`int`): The width D.
        sharing_ratio (`float`): The share β in (0, 1] of channels that are active.
        routing_alpha (`float`): α > 0. With larger values, the windows of timesteps with little noise lie closer together.
        num_train_timesteps (`int`): The number T of timesteps of the training noise schedule.
        routing (`str`): 'window' or 'random'.

    Raises:
        ValueError: for a value outside those ranges.
    """

    window_starts: torch.Tensor
    random_masks: torch.Tensor

    def __init__(self, dim: int, sharing_ratio: float, routing_alpha: float, num_train_timesteps: int, routing: str):
        super().__init__()
        if not 0 < sharing_ratio <= 1 or int(dim * sharing_ratio) == 0:
            raise ValueError(
                f"Expected `sharing_ratio` to be in (0, 1] and to leave a channel of {dim}, but got {sharing_ratio}."
            )
        if routing_alpha <= 0:
            raise ValueError(f"Expected `routing_alpha` to be positive, but got {routing_alpha}.")
        if routing not in ("window", "random"):
            raise ValueError(f"Expected `routing` to be 'window' or 'random', but got {routing!r}.")
        self.dim = dim
        self.num_active = int(dim * sharing_ratio)  # n
        self.num_train_timesteps = num_train_timesteps

        if routing == "window":
            # start(t) = round((t / (T - 1))^α · (D - n)), half to even
            progress = torch.arange(num_train_timesteps, dtype=torch.float64) / max(num_train_timesteps - 1, 1)
            starts = (progress**routing_alpha * (dim - self.num_active)).round().long()  # (T,)
            self.register_buffer("window_starts", starts, persistent=False)
        else:
            order = torch.rand(num_train_timesteps, dim, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
            self.register_buffer("random_masks", order < self.num_active)  # (T, D)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """
        Look up which channels are active.

        Args:
            timestep (`torch.Tensor` of shape (B,)): Integer or float, in [0, T].

        Returns:
            `torch.BoolTensor` of shape (B, D): True where a channel is active.
        """
        # the same as `NoiseIntervals.uniform(T, T).index(t)`: every timestep is an interval of its own
        task = timestep.long().clamp(max=self.num_train_timesteps - 1)
        if hasattr(self, "random_masks"):
            return self.random_masks[task]
        start = self.window_starts[task, None]  # (B, 1)
        channel = torch.arange(self.dim, device=start.device)
        return (channel >= start) & (channel < start + self.num_active)

    def masks(self) -> torch.Tensor:
        """
        Compute the masks of all timesteps.

        Returns:
            `torch.BoolTensor` of shape (T, D).
        """
        device = next(self.buffers()).device
        return self(torch.arange(self.num_train_timesteps, device=device))


class DTRBlock(DiTBlock):
    """A DiT block that reads the active channels only; the other channels bypass it. Arguments as for [`DiTBlock`]."""

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """
        Apply the block to the active channels.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): The tokens.
            conditioning (`torch.Tensor` of shape (B, D)): The sum of timestep and label embeddings.
            routing (two `torch.Tensor` of shape (B, 1, D) or (1, 1, D)): m, 1 for active channels, and 1 - m.

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        active, inactive = routing
        # out = block(m ⊙ x) + (1 - m) ⊙ x; the sum in place, as no gradient needs the block's output
        return super().forward(active * hidden_states, conditioning).addcmul_(inactive, hidden_states)


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
        ValueError: as [`DiTModel`] and [`TaskRouting`] do.
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
        self.task_routing = TaskRouting(dim, sharing_ratio, routing_alpha, self.config.num_train_timesteps, routing)

    def make_block(self, *sizes: Any) -> DTRBlock:
        """See [`DiTModel.make_block`]."""
        return DTRBlock(*sizes)

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """See [`DiTModel.block_inputs`]; the two inputs are those of [`DTRBlock`]."""
        active = self.task_routing(timestep)[:, None]  # (B, 1, D), or (1, 1, D) for a batch that shares its timestep
        return active.to(dtype), (~active).to(dtype)
