"""The layers of a DiT: attention, the adaLN-Zero block, and the embedding of timestep and label.
https://arxiv.org/abs/2212.09748

Legend: B batch, N tokens, D width, H and W height and width in (latent) pixels, p patch size, C channels.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from ..inputs import drop_labels


class DiTAttnProcessor:
    """Compute self-attention with the backend that `set_attention_backend` chose."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "DiTAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Compute the attention of all tokens.

        Args:
            attn ([`DiTAttention`]): The layer with the weights.
            hidden_states (`torch.Tensor` of shape (B, N, D)): The tokens.

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (B, N, heads, d)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))  # (B, N, D)


class DiTAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with one matrix for query, key and value, as the published weights have it.

    Args:
        dim (`int`): The width D.
        heads (`int`): The number of heads, which divides D.
    """

    _default_processor_cls = DiTAttnProcessor
    _available_processors = [DiTAttnProcessor]
    _supports_qkv_fusion = False  # query, key and value are always fused here

    processor: DiTAttnProcessor
    to_qkv: nn.Module
    to_out: nn.Module

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.processor = self._default_processor_cls()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) → (B, N, D)."""
        return self.processor(self, hidden_states)


class DiTBlock(nn.Module):
    """
    A transformer block with adaLN-Zero conditioning (DiT, section 3.2).

    Args:
        dim (`int`): The width D.
        heads (`int`): The number of attention heads.
        dropout (`float`): The dropout probability in the feed-forward layer.
        norm_eps (`float`): The eps of the second LayerNorm; the first always has 1e-6.
    """

    def __init__(self, dim: int, heads: int, dropout: float, norm_eps: float):
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = DiTAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=norm_eps)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn="gelu-approximate")

    def modulation(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Compute how the conditioning shifts, scales and gates both halves of the block.

        Args:
            conditioning (`torch.Tensor` of shape (B, D)): c, the sum of timestep and label embeddings.

        Returns:
            Six `torch.Tensor` of shape (B, 1, D): shift₁, 1 + scale₁, gate₁, shift₂, 1 + scale₂, gate₂.
        """
        # shift₁, scale₁, gate₁, shift₂, scale₂, gate₂ = Linear(SiLU(c))
        parts = self.norm1.linear(self.norm1.silu(conditioning))[:, None].chunk(6, dim=-1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        return shift_msa, 1 + scale_msa, gate_msa, shift_mlp, 1 + scale_mlp, gate_mlp

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, *, modulation: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Apply the block.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): The tokens.
            conditioning (`torch.Tensor` of shape (B, D)): c, the sum of timestep and label embeddings.
            modulation (`torch.Tensor` of shape (6, B, 1, D), *optional*): What [`~DiTBlock.modulation`] makes of c, if it is known.

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        parts = self.modulation(conditioning) if modulation is None else modulation.unbind()
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts  # the scales with 1 added

        # x ← x + gate₁ · Attn(LN(x)·(1 + scale₁) + shift₁)
        normed = torch.addcmul(shift_msa, self.norm1.norm(hidden_states), scale_msa)
        hidden_states = torch.addcmul(hidden_states, gate_msa, self.attn(normed))

        # x ← x + gate₂ · MLP(LN(x)·(1 + scale₂) + shift₂)
        normed = torch.addcmul(shift_mlp, self.norm2(hidden_states), scale_mlp)
        return torch.addcmul(hidden_states, gate_mlp, self.ff(normed))


class PositionedPatchEmbed(PatchEmbed):
    """
    Diffusers' patch embedding, which computes the position embeddings of each size of images once and not in every call.

    A graph computes them itself, as it can fuse these operations. Arguments as for `PatchEmbed`.
    """

    MAX_TABLES = 32  # for sizes of images other than the trained one

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tables: dict[tuple, torch.Tensor] = {}

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, N, D)."""
        grid_size = latent.shape[-2] // self.patch_size, latent.shape[-1] // self.patch_size
        # within `torch.func.jvp` or a `FakeTensorMode`, for example, the table would be of no use outside of it; private to PyTorch
        is_plain = type(latent) is torch.Tensor and not torch._C._are_functorch_transforms_active()
        if grid_size == (self.height, self.width) or torch.compiler.is_compiling() or not is_plain:
            return super().forward(latent)
        hidden_states = self.proj(latent).flatten(2).transpose(1, 2)
        return (hidden_states + self._table(grid_size, latent.device)).to(hidden_states.dtype)

    def _table(self, grid_size: tuple[int, int], device: torch.device) -> torch.Tensor:
        """The position embeddings (N, D) of a size of images."""
        if (grid_size, device) not in self._tables:
            with torch.inference_mode(False):  # for calls outside of it, too
                table = get_2d_sincos_pos_embed(
                    self.pos_embed.shape[-1],
                    grid_size,
                    base_size=self.base_size,
                    interpolation_scale=self.interpolation_scale,
                    device=device,
                    output_type="pt",
                )
            if len(self._tables) == self.MAX_TABLES:
                self._tables.clear()
            self._tables[grid_size, device] = table.float()
        return self._tables[grid_size, device]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tables": {}}  # copies make their own, where they are


class TimestepLabelEmbedding(nn.Module):
    """
    The conditioning c = embed(t) + embed(y) of timestep t and label y, computed once for all blocks.

    Args:
        dim (`int`): The width D.
        num_classes (`int`): The number of classes without the null class.
        class_dropout_prob (`float`): How often training drops a label. Above 0 there is a null class, with the index
            `num_classes`.
        downscale_freq_shift (`float`): See [`DiTModel`].
    """

    def __init__(self, dim: int, num_classes: int, class_dropout_prob: float, downscale_freq_shift: float):
        super().__init__()
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift)
        self.timestep_embedder = TimestepEmbedding(in_channels=256, time_embed_dim=dim)
        self.class_embedder = nn.Embedding(num_classes + (class_dropout_prob > 0), dim)

    def forward(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embed timesteps and labels.

        Args:
            timestep (`torch.Tensor` of shape (B,) or (1,)): In steps of the training schedule, integer or float.
            class_labels (`torch.LongTensor` of shape (B,)): In [0, num_classes]; `num_classes` is the null class.
            force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Which labels become the null class. If None,
                random ones in training, and none otherwise.

        Returns:
            `torch.Tensor` of shape (B, D).
        """
        drop_prob = self.class_dropout_prob if self.training else 0.0
        class_labels = drop_labels(class_labels, self.num_classes, drop_prob, force_drop_ids)
        label_embedding = self.class_embedder(class_labels)  # (B, D)
        time_features = self.time_proj(timestep).to(label_embedding.dtype)  # (B or 1, 256)
        return self.timestep_embedder(time_features) + label_embedding


def unpatchify(hidden_states: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """
    Assemble an image from its tokens.

    Args:
        hidden_states (`torch.Tensor` of shape (B, N, p·p·C)): The tokens, row by row.
        height (`int`): H.
        width (`int`): W.
        patch_size (`int`): p.

    Returns:
        `torch.Tensor` of shape (B, C, H, W).
    """
    hidden_states = hidden_states.unflatten(1, (height // patch_size, width // patch_size))
    hidden_states = hidden_states.unflatten(-1, (patch_size, patch_size, -1))  # (B, H/p, W/p, p, p, C)
    return torch.einsum("bhwpqc->bchpwq", hidden_states).reshape(len(hidden_states), -1, height, width)
