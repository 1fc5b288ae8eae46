"""Patch Diffusion: a UNet that works on patches of p x p pixels, which makes it about p² times cheaper.
https://arxiv.org/abs/2207.04316

Legend: B batch, C image channels, H and W height and width in pixels, p patch size, D the width of a level.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..saving.mixins import StandaloneModelMixin
from ..saving.naming import PACKAGE
from .inputs import checked_labels, checked_timestep, drop_labels, to_device
from .patched_unet_config import check_patched_unet_config
from .patched_unet_layers import NORM_GROUPS, PatchedResBlock, PatchedUNetLayer, position_table, variance_head


class PatchedUNet2DModel(StandaloneModelMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The UNet of Patch Diffusion (https://arxiv.org/abs/2207.04316): ADM's UNet on patches of p x p pixels.

    Args:
        sample_size (`int`): Height and width of the training images, in pixels. Images of other sizes can be sampled.
        in_channels (`int`): The number of channels C of the images.
        out_channels (`int`, *optional*): C by default; 2C for a model that also learns its variance, in [0, 1], for
            `variance_type="learned_range_sigmoid"`.
        patch_size (`int`): p.
        model_channels (`int`): The width that `channel_multipliers` multiply.
        channel_multipliers (`tuple[float, ...]`): The width of each level, the finest first, as a multiple.
        layers_per_block (`int`): The number of residual blocks of each level on the way down; on the way up one more.
        attention_levels (`tuple[int, ...]`): The levels with self-attention, besides the middle; 0 is the finest.
        attention_head_dim (`int`): Channels per attention head.
        dropout (`float`): The dropout probability in the residual blocks.
        num_classes (`int`, *optional*): The number of classes without the null class, whose index is `num_classes`. None
            for an unconditional model.
        class_dropout_prob (`float`): How often training replaces a label by the null class; 0 for a model without one.
        low_res_channels (`int`): The number of channels of the low-resolution image that a super-resolution model starts
            from; 0 for any other model.
        num_train_timesteps (`int`): The number T of timesteps of the training noise schedule.
        prediction_type (`str`): What the model is trained to predict: 'sample' (x0), 'epsilon' or 'v_prediction'.
        snr_interval (`tuple[float | None, float | None]`, *optional*): The interval of signal-to-noise ratios that the
            model is trained for, the highest first; None for no bound.

    Raises:
        ValueError: if a number is not positive, a width is not divisible by its groups or heads, `sample_size` is not
            divisible by patch size and downsampling, or `prediction_type` is unknown.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _supports_gradient_checkpointing = True
    _no_split_modules = ["PatchedUNetLayer"]
    _repeated_blocks = ["PatchedUNetLayer"]
    _skip_layerwise_casting_patterns = ["norm"]

    variance_type = "learned_range_sigmoid"  # what the variance channels mean, if there are any

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
        check_patched_unet_config(self.config, widths)
        self.out_channels = in_channels if out_channels is None else out_channels
        time_embed_dim = widths[-1]

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
            self.class_embedding = nn.Embedding(num_classes + (class_dropout_prob > 0), widths[0])

        # 2. Down, middle, up
        self._make_levels(widths, time_embed_dim)

        # 3. Output
        self.norm_out = nn.GroupNorm(NORM_GROUPS, widths[0])
        self.conv_out = nn.Conv2d(widths[0], patch_channels, 3, padding=1)
        self.variance_time_proj = self.variance_out = None
        if self.out_channels == 2 * in_channels:
            self.variance_time_proj = nn.Linear(time_embed_dim, 2 * widths[0])
            self.variance_out = variance_head(2 * widths[0], model_channels, patch_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def _make_levels(self, widths: list[int], time_embed_dim: int) -> None:
        """Make the layers of the way down, of the middle and of the way up; one list each, which Diffusers can offload."""
        config = self.config
        class_embed_dim = None if config.num_classes is None else widths[0]

        def layer(in_width: int, out_width: int, has_attention: bool) -> PatchedUNetLayer:
            head_dim = config.attention_head_dim if has_attention else None
            sizes = (in_width, out_width, time_embed_dim, class_embed_dim, config.dropout)
            return PatchedUNetLayer(*sizes, attention_head_dim=head_dim)

        attends = [level in config.attention_levels for level in range(len(widths))]
        self.down_layers, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_layers.extend(layer(width, width, attends[level]) for _ in range(config.layers_per_block))
        for width, next_width in zip(widths, widths[1:]):
            # padding at the lower right only, as TensorFlow's SAME pads even sizes
            self.downsamplers.append(Downsample2D(width, use_conv=True, out_channels=next_width, padding=0, name="op"))
        self.mid_layers = nn.ModuleList([layer(widths[-1], widths[-1], True), layer(widths[-1], widths[-1], False)])
        self.up_layers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            # twice as wide, as each layer's input is concatenated with a skip connection from the way down
            self.up_layers.extend(layer(2 * width, width, attends[level]) for _ in range(config.layers_per_block + 1))
        for width, next_width in zip(widths[::-1], widths[-2::-1]):
            self.upsamplers.append(Upsample2D(width, use_conv=True, out_channels=next_width))

    def initialize_weights(self) -> None:
        """Initialise as ADM: every block starts as the identity, the output as zero, and the rest as PyTorch does."""
        zeroed: list[Any] = [self.conv_out]
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
        class_labels: torch.Tensor | None = None,
        force_drop_ids: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        Predict what `prediction_type` says, and the variance if the model learns it.

        Args:
            sample (`torch.Tensor` of shape (B, C, H, W)): Noisy images.
            timestep (`torch.Tensor` of shape (B,), (1,) or (), `int` or `float`): In steps of the training schedule, on
                any device.
            class_labels (`torch.LongTensor` of shape (B,), *optional*): In [0, num_classes], on any device. If None, the
                null class, or the only class.
            force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Which labels become the null class. If None,
                random ones in training, and none otherwise.
            low_res (`torch.Tensor` of shape (B, low_res_channels, h, w), *optional*): The images that a super-resolution
                model starts from, in [-1, 1], of any height and width. Required if `low_res_channels` is not 0.
            return_dict (`bool`): Whether to return a dataclass or a tuple.

        Returns:
            [`UNet2DOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: if H or W is not divisible by patch size and downsampling, the channels are not C, there are neither
                one nor B timesteps, (on the CPU) a timestep or label is out of range, or `low_res` is missing, not expected,
                or of another shape.
        """
        temb, class_emb = self._embed(sample, timestep, class_labels, force_drop_ids)
        hidden_states = self.conv_in(self._patchify(sample, low_res))  # (B, D, H/p, W/p)
        positions = self.positions
        if positions.shape[2:] != hidden_states.shape[2:]:
            positions = position_table(positions.shape[1], *hidden_states.shape[2:]).to(positions)
        first_features = hidden_states = hidden_states + positions.to(hidden_states.dtype)

        hidden_states = self._run_levels(hidden_states, temb, class_emb)

        output = self.conv_out(F.silu(self.norm_out(hidden_states)))
        output = F.pixel_shuffle(output, self.config.patch_size)  # (B, C, H, W)
        if self.variance_out is not None and self.variance_time_proj is not None:
            # detached: the variance's loss does not train the layers before its head
            features = torch.cat([first_features, hidden_states], dim=1).detach()
            features = features + self.variance_time_proj(F.silu(temb))[:, :, None, None]
            variance = F.pixel_shuffle(self.variance_out(features), self.config.patch_size)
            output = torch.cat([output, variance], dim=1)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _run_levels(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, class_emb: torch.Tensor | None
    ) -> torch.Tensor:
        """Go down the levels and up again: (B, D, H/p, W/p) → (B, D, H/p, W/p)."""
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
        return hidden_states

    def _embed(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None,
        force_drop_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the embeddings of timestep (B or 1, …) and class (B, …)."""
        timestep = checked_timestep(timestep, len(sample), self.config.num_train_timesteps)
        features = self.time_proj(to_device(timestep, sample.device)).to(sample.dtype)
        temb = self.time_embedding(features)
        if self.class_embedding is None:
            return temb, None
        num_classes = self.config.num_classes
        class_labels = checked_labels(class_labels, num_classes, self.class_embedding.num_embeddings, sample)
        drop_prob = self.config.class_dropout_prob if self.training else 0.0
        return temb, self.class_embedding(drop_labels(class_labels, num_classes, drop_prob, force_drop_ids))

    def _patchify(self, sample: torch.Tensor, low_res: torch.Tensor | None) -> torch.Tensor:
        """(B, C, H, W) → (B, (C + low_res_channels)·p·p, H/p, W/p)."""
        height, width = sample.shape[2:]
        if sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"Expected `sample` to have the {self.config.in_channels} channels of `in_channels`, "
                f"but got {sample.shape[1]}."
            )
        multiple = self.config.patch_size * 2 ** len(self.downsamplers)
        if height % multiple or width % multiple:
            raise ValueError(
                f"Expected the height and width of `sample` to be divisible by {multiple}, `patch_size` times "
                f"downsampling, but got {height} x {width}."
            )
        self._check_low_res(low_res, len(sample))
        if low_res is not None:
            upsampled = F.interpolate(low_res, (height, width), mode="bilinear")
            sample = torch.cat([sample, upsampled.to(sample.dtype)], dim=1)
        return F.pixel_unshuffle(sample, self.config.patch_size)

    def _check_low_res(self, low_res: torch.Tensor | None, batch_size: int) -> None:
        channels = 0 if low_res is None else low_res.shape[1]
        if channels != self.config.low_res_channels:
            raise ValueError(
                f"Expected `low_res` to have the {self.config.low_res_channels} channels of `low_res_channels`, "
                f"but got {channels}."
            )
        if low_res is not None and len(low_res) != batch_size:
            raise ValueError(
                f"Expected `low_res` to have one image for each of {batch_size} samples, but got {len(low_res)}."
            )

    def _run(self, layer: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Call a layer, with gradient checkpointing if it is enabled."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)
