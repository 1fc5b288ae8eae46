"""Patch Diffusion: a UNet that works on patches of the image, so that its cost falls with the square of their side.
https://arxiv.org/abs/2207.04316

Legend: B batch, C image channels, H and W height and width in pixels, p patch size, D the width of a level.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..diffusion.predictions import PREDICTION_TYPES
from ..intervals import check_timesteps
from ..saving.mixins import StandaloneModelMixin
from ..saving.naming import PACKAGE
from .inputs import checked_labels, drop_labels, shared_or_per_sample

NORM_GROUPS = 32
POSITION_SCALE = 64  # the positions' range, whatever the number of patches
GATE_BIAS = 2.0  # a new class gate lets sigmoid(2) = 0.88 through


class PatchedResBlock(nn.Module):
    """
    A residual block with timestep by scale and shift, and class by gate (Patch Diffusion, appendix).

    Args:
        in_channels (`int`), out_channels (`int`): Widths.
        time_embed_dim (`int`): Of the timestep's embedding.
        class_embed_dim (`int`, *optional*): Of the class's embedding; None for an unconditional block.
        dropout (`float`): Before the last convolution.
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
        Args:
            hidden_states (`torch.Tensor` of shape (B, D_in, h, w)): The features.
            temb (`torch.Tensor` of shape (B or 1, T)): Embedding of the timestep, after its SiLU.
            class_emb (`torch.Tensor` of shape (B, E), *optional*): Embedding of the class.
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
    """A residual block, followed or not by self-attention; arguments as [`PatchedResBlock`]'s."""

    def __init__(self, *sizes, attention_head_dim: int | None, **kwargs):
        super().__init__()
        self.resnet = PatchedResBlock(*sizes, **kwargs)
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
                _from_deprecated_attn_block=True,  # on (B, D, h, w)
            )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, class_emb: torch.Tensor | None) -> torch.Tensor:
        hidden_states = self.resnet(hidden_states, temb, class_emb)
        return hidden_states if self.attn is None else self.attn(hidden_states)


class PatchedUNet2DModel(StandaloneModelMixin, ModelMixin, ConfigMixin):
    r"""
    The UNet of Patch Diffusion (https://arxiv.org/abs/2207.04316): ADM's on patches of p x p pixels.

    Args:
        sample_size (`int`): Height and width of the training images, in pixels. Others can be sampled.
        in_channels (`int`): C.
        out_channels (`int`, *optional*): C by default; 2C for a model that learns its variance as well, in [0, 1], for
            `variance_type="learned_range_sigmoid"`.
        patch_size (`int`): p.
        model_channels (`int`): The width that is multiplied.
        channel_multipliers (`tuple[float, ...]`): Of each level, the finest first.
        layers_per_block (`int`): Residual blocks of each level, on the way down; one more on the way up.
        attention_levels (`tuple[int, ...]`): Which levels attend, beside the middle; 0 is the finest.
        attention_head_dim (`int`): Channels per head.
        dropout (`float`): Of the residual blocks.
        num_classes (`int`, *optional*): None for an unconditional model. The null class has the index `num_classes`.
        class_dropout_prob (`float`): How often training replaces a label by the null class; 0 for a model without it.
        low_res_channels (`int`): Of the image that a super-resolution model is given; 0 for any other.
        num_train_timesteps (`int`): T of the training noise schedule.
        prediction_type (`str`): What the model is trained to predict: 'sample' (x0), 'epsilon' or 'v_prediction'.
        snr_interval (`tuple[float | None, float | None]`, *optional*): The stretch of signal-to-noise ratios that it is
            trained on, highest first; None for no bound.

    Raises:
        ValueError: if a number is not positive, a width not divisible by its groups or heads, or `sample_size` not
            divisible by patch size and downsampling.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _supports_gradient_checkpointing = True
    _no_split_modules = ["PatchedUNetLayer"]
    _repeated_blocks = ["PatchedUNetLayer"]
    _skip_layerwise_casting_patterns = ["norm"]

    variance_type = "learned_range_sigmoid"  # what its variance channels mean, if it has them

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 4,
        model_channels: int = 128,
        channel_multipliers: tuple[float, ...] = (1, 1, 2, 2),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (2, 3),
        attention_head_dim: int = 64,
        dropout: float = 0.0,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        low_res_channels: int = 0,
        num_train_timesteps: int = 1000,
        prediction_type: str = "sample",
        snr_interval: "tuple[float | None, float | None] | None" = None,
    ):
        super().__init__()
        widths = [int(multiplier * model_channels) for multiplier in channel_multipliers]
        _check_config(self.config, widths)
        self.out_channels = in_channels if out_channels is None else out_channels
        time_embed_dim = widths[-1]
        class_embed_dim = None if num_classes is None else widths[0]

        def layer(in_width: int, out_width: int, attends: bool) -> PatchedUNetLayer:
            return PatchedUNetLayer(
                in_width,
                out_width,
                time_embed_dim,
                class_embed_dim,
                dropout,
                attention_head_dim=attention_head_dim if attends else None,
            )

        # 1. Input
        patch_channels = in_channels * patch_size**2
        self.conv_in = nn.Conv2d(patch_channels + low_res_channels * patch_size**2, widths[0], 3, padding=1)
        num_patches = sample_size // patch_size
        self.register_buffer("positions", position_table(widths[0], num_patches, num_patches), persistent=False)
        self.time_proj = Timesteps(model_channels, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_embedding = TimestepEmbedding(
            model_channels, 4 * model_channels, out_dim=time_embed_dim, post_act_fn="silu"
        )
        self.class_embedding = None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + (class_dropout_prob > 0), class_embed_dim)

        # 2. Down, middle, up
        self.down_layers, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):  # one list of all levels' layers, of which Diffusers can offload groups
            self.down_layers.extend(layer(width, width, level in attention_levels) for _ in range(layers_per_block))
        for width, next_width in zip(widths, widths[1:]):
            # padded at the lower right alone, as TensorFlow's SAME pads even sizes
            self.downsamplers.append(Downsample2D(width, use_conv=True, out_channels=next_width, padding=0, name="op"))
        self.mid_layers = nn.ModuleList([layer(widths[-1], widths[-1], True), layer(widths[-1], widths[-1], False)])
        self.up_layers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            attends = level in attention_levels
            # beside its input, each takes what a layer of its level, or the one that led to it, left on the way down
            self.up_layers.extend(layer(2 * width, width, attends) for _ in range(layers_per_block + 1))
        for width, next_width in zip(widths[::-1], widths[-2::-1]):
            self.upsamplers.append(Upsample2D(width, use_conv=True, out_channels=next_width))

        # 3. Output
        self.norm_out = nn.GroupNorm(NORM_GROUPS, widths[0])
        self.conv_out = nn.Conv2d(widths[0], patch_channels, 3, padding=1)
        self.variance_time_proj = self.variance_out = None
        if self.out_channels == 2 * in_channels:
            self.variance_time_proj = nn.Linear(time_embed_dim, 2 * widths[0])
            self.variance_out = nn.Sequential(
                nn.Conv2d(2 * widths[0], model_channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(model_channels, patch_channels, 3, padding=1),
                nn.Sigmoid(),
            )
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """ADM's: every block starts as the identity, the output as zero; the rest as PyTorch has it."""
        zeroed = [self.conv_out]
        for module in self.modules():
            if isinstance(module, PatchedResBlock):
                zeroed += [module.time_emb_proj, module.conv2]
            elif isinstance(module, Attention):
                zeroed.append(module.to_out[0])
        for module in zeroed:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.LongTensor | None = None,
        force_drop_ids: torch.BoolTensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): Noisy images.
            timestep (`torch.Tensor` of shape (B,), (1,) or (), `int` or `float`): In steps of the training schedule, on
                any device.
            class_labels (`torch.LongTensor` of shape (B,), *optional*): In [0, num_classes], on any device; the null
                class, if there is one, when it is left out.
            force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Labels to drop; random in training if not given.
            low_res (`torch.Tensor` of shape (B, low_res_channels, h, w), *optional*): What a super-resolution model starts
                from, of any size.
            return_dict (`bool`): Whether to return a dataclass or a tuple.

        Returns:
            [`UNet2DOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: if H or W is not divisible by patch size and downsampling, the channels are not C, there are neither
                one nor B timesteps, (on the CPU) a timestep or label is out of range, or `low_res` is missing or too much.
        """
        temb, class_emb = self._embed(sample, timestep, class_labels, force_drop_ids)
        hidden_states = self.conv_in(self._patches(sample, low_res))  # (B, D, H/p, W/p)
        positions = self.positions
        if positions.shape[2:] != hidden_states.shape[2:]:
            positions = position_table(positions.shape[1], *hidden_states.shape[2:]).to(positions)
        first_features = hidden_states = hidden_states + positions.to(hidden_states.dtype)

        # Down
        skips = [hidden_states]
        for index, layer in enumerate(self.down_layers, start=1):
            hidden_states = self._run(layer, hidden_states, temb, class_emb)
            skips.append(hidden_states)
            level, rest = divmod(index, self.config.layers_per_block)
            if rest == 0 and level <= len(self.downsamplers):
                hidden_states = self.downsamplers[level - 1](hidden_states)
                skips.append(hidden_states)
        # Middle
        for layer in self.mid_layers:
            hidden_states = self._run(layer, hidden_states, temb, class_emb)
        # Up
        for index, layer in enumerate(self.up_layers, start=1):
            hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
            hidden_states = self._run(layer, hidden_states, temb, class_emb)
            level, rest = divmod(index, self.config.layers_per_block + 1)
            if rest == 0 and level <= len(self.upsamplers):
                hidden_states = self.upsamplers[level - 1](hidden_states)

        # Output
        output = self.conv_out(F.silu(self.norm_out(hidden_states)))
        output = F.pixel_shuffle(output, self.config.patch_size)  # (B, C, H, W)
        if self.variance_out is not None:
            # the variance learns from features that it does not shape
            features = torch.cat([first_features, hidden_states], dim=1).detach()
            features = features + self.variance_time_proj(F.silu(temb))[:, :, None, None]
            variance = F.pixel_shuffle(self.variance_out(features), self.config.patch_size)
            output = torch.cat([output, variance], dim=1)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _embed(self, sample, timestep, class_labels, force_drop_ids) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings of timestep (B or 1, T) and class (B, E)."""
        timestep = torch.as_tensor(timestep)
        check_timesteps(timestep, self.config.num_train_timesteps)
        timestep = shared_or_per_sample(timestep)
        if len(timestep) not in (1, len(sample)):
            raise ValueError(f"Expected `timestep` to be one or {len(sample)}, but got {len(timestep)} of them.")
        features = self.time_proj(timestep.to(sample.device, non_blocking=True)).to(sample.dtype)
        temb = self.time_embedding(features)
        if self.class_embedding is None:
            return temb, None
        num_classes = self.config.num_classes
        class_labels = checked_labels(class_labels, num_classes, self.class_embedding.num_embeddings, sample)
        drop_prob = self.config.class_dropout_prob if self.training else 0.0
        return temb, self.class_embedding(drop_labels(class_labels, num_classes, drop_prob, force_drop_ids))

    def _patches(self, sample: torch.Tensor, low_res: torch.Tensor | None) -> torch.Tensor:
        """(B, C, H, W) → (B, C·p·p, H/p, W/p), with the channels of the low-resolution image, if there is one."""
        channels, height, width = sample.shape[1:]
        if channels != self.config.in_channels:
            raise ValueError(
                f"Expected `sample` to have the {self.config.in_channels} channels of `in_channels`, but got {channels}."
            )
        multiple = self.config.patch_size * 2 ** len(self.downsamplers)
        if height % multiple or width % multiple:
            raise ValueError(
                f"Expected the height and width of `sample` to be divisible by {multiple}, `patch_size` times "
                f"downsampling, but got {height} x {width}."
            )
        low_res_channels = 0 if low_res is None else low_res.shape[1]
        if low_res_channels != self.config.low_res_channels:
            raise ValueError(
                f"Expected `low_res` to have the {self.config.low_res_channels} channels of `low_res_channels`, "
                f"but got {low_res_channels}."
            )
        if low_res is not None:
            upsampled = F.interpolate(low_res, (height, width), mode="bilinear")
            sample = torch.cat([sample, upsampled.to(sample.dtype)], dim=1)
        return F.pixel_unshuffle(sample, self.config.patch_size)

    def _run(self, layer: PatchedUNetLayer, *inputs) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)


def position_table(dim: int, height: int, width: int) -> torch.Tensor:
    """
    The positions (1, D, h, w) that are added to the first features: half of the channels tell the column, half the row.
    """
    half = dim // 2
    # sin(64·i/n·10000^(-k/(D/2 - 1))), k = 0 … D/2 - 1
    # in float32 also where a model is made in half precision
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    columns, rows = (
        torch.sin(torch.arange(size, dtype=torch.float32)[:, None] * frequencies * (POSITION_SCALE / size))
        for size in (width, height)
    )
    columns = columns.T[:, None, :].expand(half, height, width)
    rows = rows.T[:, :, None].expand(half, height, width)
    return torch.cat([columns, rows])[None]


def _check_config(config, widths: list[int]) -> None:
    for name in ("sample_size", "in_channels", "patch_size", "model_channels", "layers_per_block", "attention_head_dim",
                 "num_train_timesteps"):  # fmt: skip
        if config[name] < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {config[name]}.")
    if config.out_channels not in (None, config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"Expected `out_channels` to be `in_channels`, {config.in_channels}, or twice as many for a learned variance, but "
            f"got {config.out_channels}."
        )
    multiple = config.patch_size * 2 ** (len(widths) - 1)
    if config.sample_size % multiple:
        raise ValueError(
            f"Expected `sample_size` to be divisible by {multiple}, `patch_size` times downsampling, "
            f"but got {config.sample_size}."
        )
    for multiplier, width in zip(config.channel_multipliers, widths):
        if width % NORM_GROUPS or width == 0:
            raise ValueError(
                f"Expected `channel_multipliers` to give multiples of {NORM_GROUPS} channels, but got {multiplier} x "
                f"{config.model_channels}."
            )
    for level in {*config.attention_levels, len(widths) - 1}:  # the middle attends, too
        if not 0 <= level < len(widths):
            raise ValueError(f"Expected `attention_levels` to be in [0, {len(widths)}), but got {level}.")
        if widths[level] % config.attention_head_dim:
            raise ValueError(
                f"Expected `attention_head_dim` to divide the {widths[level]} channels of level {level}, "
                f"but got {config.attention_head_dim}."
            )
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"Expected `prediction_type` to be one of {', '.join(PREDICTION_TYPES)}, but got {config.prediction_type!r}."
        )
