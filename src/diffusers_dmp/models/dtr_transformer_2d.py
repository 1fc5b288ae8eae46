"""DTR: a DiT whose channels are routed by timestep, without any parameter of its own.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width, T training timesteps; a task is one timestep.
"""

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..saving.naming import PACKAGE
from .dit.layers import DiTBlock
from .dit.model import DiTModel


class TaskRouting(nn.Module):
    """
    Which channels a timestep may read: its mask m_t of n = ⌊D·β⌋ ones among D channels (DTR, section 4.1).

    With `routing="window"` the ones are contiguous and the window slides from the first channels (clean images) to the
    last (noise), so that near timesteps share most of their channels. Only the T first channels are stored. With
    `routing="random"`, the paper's baseline, they lie anywhere, and the one table of masks is saved with the weights.

    Args:
        dim (`int`): The width D.
        sharing_ratio (`float`): β in (0, 1], the share of channels that are active.
        routing_alpha (`float`): α > 0; larger values give the clean timesteps more neighbouring windows.
        num_train_timesteps (`int`): T.
        routing (`str`): 'window' or 'random'.

    Raises:
        ValueError: for a value outside those ranges.
    """

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

    def forward(self, timestep: torch.Tensor) -> torch.BoolTensor:
        """
        Args:
            timestep (`torch.Tensor` of shape (B,)): Integer or float, in [0, T].

        Returns:
            `torch.BoolTensor` of shape (B, D), true where a channel is active.
        """
        # a task is a timestep, so that ⌊t⌋ is `NoiseIntervals.uniform(T, T).index(t)`
        task = timestep.long().clamp(max=self.num_train_timesteps - 1)
        if hasattr(self, "random_masks"):
            return self.random_masks[task]
        start = self.window_starts[task, None]  # (B, 1)
        channel = torch.arange(self.dim, device=start.device)
        return (channel >= start) & (channel < start + self.num_active)

    def masks(self) -> torch.BoolTensor:
        """The masks (T, D) of all timesteps."""
        device = next(self.buffers()).device
        return self(torch.arange(self.num_train_timesteps, device=device))


class DTRBlock(DiTBlock):
    """A DiT block that reads its active channels, and past which the others flow unchanged."""

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, active: torch.Tensor, inactive: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)), conditioning (`torch.Tensor` of shape (B, D)).
            active, inactive (`torch.Tensor` of shape (B, 1, D) or (1, 1, D)): m and 1 - m.
        """
        # out = block(m ⊙ x) + (1 - m) ⊙ x, the sum in place, as no gradient needs the block's output
        return super().forward(active * hidden_states, conditioning).addcmul_(inactive, hidden_states)


class DTRTransformer2DModel(DiTModel):
    """
    DiT with Denoising Task Routing (https://arxiv.org/abs/2310.07138).

    Every timestep activates a window of channels, the same in all blocks. `sharing_ratio=1` is the plain DiT.

    Args:
        sharing_ratio (`float`): β, the share of active channels, in (0, 1].
        routing_alpha (`float`): α, how the windows crowd towards the clean timesteps.
        routing (`str`): 'window', or 'random' for the paper's baseline.

    The other arguments are those of [`DiTModel`].

    Raises:
        ValueError: as [`DiTModel`] and [`TaskRouting`] do.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _no_split_modules = ["DTRBlock"]
    _repeated_blocks = ["DTRBlock"]

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        sample_size: int = 32,
        patch_size: int = 2,
        norm_eps: float = 1e-6,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        num_train_timesteps: int = 1000,
        downscale_freq_shift: float = 0.0,
        sharing_ratio: float = 0.8,
        routing_alpha: float = 4.0,
        routing: str = "window",
    ):
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            sample_size=sample_size,
            patch_size=patch_size,
            norm_eps=norm_eps,
            num_classes=num_classes,
            class_dropout_prob=class_dropout_prob,
            num_train_timesteps=num_train_timesteps,
            downscale_freq_shift=downscale_freq_shift,
        )
        dim = num_attention_heads * attention_head_dim
        self.task_routing = TaskRouting(dim, sharing_ratio, routing_alpha, num_train_timesteps, routing)

    def make_block(self, dim: int, heads: int, dropout: float, norm_eps: float) -> DTRBlock:
        return DTRBlock(dim, heads, dropout, norm_eps)

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        active = self.task_routing(timestep)[:, None]  # (B, 1, D), or (1, 1, D) for a batch that shares its timestep
        return active.to(dtype), (~active).to(dtype)
