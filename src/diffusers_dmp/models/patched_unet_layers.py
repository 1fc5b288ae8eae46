"""The layers of Patch Diffusion's UNet: residual blocks, attention, and position embeddings.
https://arxiv.org/abs/2207.04316

Legend: B batch, D width, h and w height and width of a level, n = h or w.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

NORM_GROUPS = 32
POSITION_SCALE = 64  # the positions' range, whatever the number of patches
GATE_BIAS = 2.0  # a new class gate has the value sigmoid(2) = 0.88


class PatchedResBlock(nn.Module):
    """
    A residual block with the timestep as scale and shift, and the class as a gate (Patch Diffusion, appendix).

    Args:
        in_channels (`int`): The input's width.
        out_channels (`int`): The output's width.
        time_embed_dim (`int`): The width of the timestep embedding.
        class_embed_dim (`int`, *optional*): The width of the class embedding; None for an unconditional block.
        dropout (`float`): The dropout probability before the last convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, time_embed_dim: int, class_embed_dim: int | None, dropout: float
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels, eps=1e-3, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.class_gate_proj = None if class_embed_dim is None else nn.Linear(class_embed_dim, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, class_emb: torch.Tensor | None) -> torch.Tensor:
        """
        Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape (B, D_in, h, w)): The features.
            temb (`torch.Tensor` of shape (B or 1, time_embed_dim)): The timestep embedding, after its SiLU.
            class_emb (`torch.Tensor` of shape (B, class_embed_dim), *optional*): The class embedding.

        Returns:
            `torch.Tensor` of shape (B, D_out, h, w).
        """
        residual = self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))  # (B, D_out, h, w)

        # h ← conv(SiLU(GN(h)·(1 + scale) + shift))
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        hidden_states = torch.addcmul(shift, self.norm2(hidden_states), 1 + scale)
        hidden_states = self.conv2(self.dropout(F.silu(hidden_states)))
        if self.class_gate_proj is None:
            return residual + hidden_states

        # x ← x + h·sigmoid(W·c + 2)
        gate = torch.sigmoid(self.class_gate_proj(class_emb) + GATE_BIAS)
        return torch.addcmul(residual, hidden_states, gate[:, :, None, None])


class PatchedUNetLayer(nn.Module):
    """
    A residual block, followed by self-attention or not.

    Args:
        sizes: The arguments of [`PatchedResBlock`].
        attention_head_dim (`int`, *optional*): Channels per attention head; None for a layer without attention.
    """

    def __init__(self, *sizes, attention_head_dim: int | None):
        super().__init__()
        self.resnet = PatchedResBlock(*sizes)
        channels = self.resnet.conv2.out_channels
        self.attn = None
        if attention_head_dim is not None:
            self.attn = Attention(
                channels,
                heads=channels // attention_head_dim,
                dim_head=attention_head_dim,
                norm_num_groups=NORM_GROUPS,
                eps=1e-5,
                bias=True,
                residual_connection=True,
                _from_deprecated_attn_block=True,  # accept (B, D, h, w)
            )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, class_emb: torch.Tensor | None) -> torch.Tensor:
        """See [`PatchedResBlock.forward`]."""
        hidden_states = self.resnet(hidden_states, temb, class_emb)
        return hidden_states if self.attn is None else self.attn(hidden_states)


def position_table(dim: int, height: int, width: int) -> torch.Tensor:
    """
    Compute position embeddings: half of the channels depend on the column, the other half on the row.

    Args:
        dim (`int`): The width D.
        height (`int`): The number of rows h.
        width (`int`): The number of columns w.

    Returns:
        `torch.Tensor` of shape (1, D, h, w).
    """
    half = dim // 2
    # sin(64·i/n·10000^(-k/(D/2 - 1))), k = 0 … D/2 - 1
    # in float32, also while a model is made in half precision
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    columns, rows = (
        torch.sin(torch.arange(size, dtype=torch.float32)[:, None] * frequencies * (POSITION_SCALE / size))
        for size in (width, height)
    )
    columns = columns.T[:, None, :].expand(half, height, width)
    rows = rows.T[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows])[None]


def variance_head(in_channels: int, hidden_channels: int, out_channels: int) -> nn.Sequential:
    """
    Make the layers that predict the variance, in [0, 1].

    Args:
        in_channels (`int`): The width of the features.
        hidden_channels (`int`): The width between the two convolutions.
        out_channels (`int`): The number of channels of a patch.

    Returns:
        `nn.Sequential`: (B, in_channels, h, w) → (B, out_channels, h, w).
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden_channels, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden_channels, out_channels, 3, padding=1),
        nn.Sigmoid(),
    )
