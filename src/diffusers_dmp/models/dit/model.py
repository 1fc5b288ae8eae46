"""The plain DiT. DTR and Remix-DiT extend it, DMP adds prompts to it, and every comparison starts from it.
https://arxiv.org/abs/2212.09748

Legend: B batch, C channels, H and W height and width in (latent) pixels, p patch size, N = H/p · W/p tokens, D width.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormZero
from torch import nn

from ...intervals import check_timesteps
from ...saving.naming import PACKAGE
from ..inputs import checked_labels, checked_timestep, to_device
from .configuration import DIT_PRESETS, check_dit_config
from .layers import DiTBlock, PositionedPatchEmbed, TimestepLabelEmbedding, unpatchify
from .modulations import check_modulations, modulations_of
from .stock_layout import StockDiTMixin


class DiTModel(StockDiTMixin, ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    r"""
    DiT (https://arxiv.org/abs/2212.09748) with one embedder for all blocks, as it was published.

    The arguments are named as those of Diffusers' [`DiTTransformer2DModel`], whose weights load through
    [`~DiTModel.from_diffusers`]. The two classes differ in two constants, by which the outputs of equal weights differ by
    about 3 %. Both semantics are available:

    | | `downscale_freq_shift` | `norm_eps` |
    | --- | --- | --- |
    | published DiT (default) | 0 | 1e-6 |
    | stock Diffusers | 1 | 1e-5 |

    Args:
        num_attention_heads (`int`), attention_head_dim (`int`): Their product is the width D.
        in_channels (`int`): The number of channels C of the (latent) images.
        out_channels (`int`, *optional*): C by default; 2C for a model that also learns its variance.
        num_layers (`int`): The number of blocks.
        dropout (`float`): The dropout probability in the feed-forward layers.
        sample_size (`int`): Height and width of the training images, in (latent) pixels. Images of other sizes can be
            sampled: the position embeddings are recomputed, scaled to the trained range.
        patch_size (`int`): Height and width p of the patches that become tokens, in (latent) pixels.
        norm_eps (`float`): The eps of the LayerNorm before each feed-forward layer (see the table).
        num_classes (`int`): The number of classes without the null class, whose index is `num_classes`. An unconditional
            model has one class and no label dropout.
        class_dropout_prob (`float`): How often training replaces a label by the null class; 0 for a model without one.
        num_train_timesteps (`int`): The number T of timesteps of the training noise schedule.
        downscale_freq_shift (`float`): The shift in the timestep frequencies 10000^(-i / (128 - shift)) (see the table).

    Raises:
        ValueError: if a number is not positive, `class_dropout_prob` is not in [0, 1], `sample_size` is not divisible by
            `patch_size`, or D is not divisible by 4.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    presets = DIT_PRESETS
    _compiled_denoise: Callable[..., torch.Tensor] | None = None

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
    ):
        super().__init__()
        check_dit_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels

        # 1. Input
        self.pos_embed = PositionedPatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        self.time_label_embed = TimestepLabelEmbedding(dim, num_classes, class_dropout_prob, downscale_freq_shift)

        # 2. Blocks
        block_sizes = (dim, num_attention_heads, dropout, norm_eps)
        self.transformer_blocks = nn.ModuleList([self.make_block(*block_sizes) for _ in range(num_layers)])

        # 3. Output
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size**2 * self.out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **config: Any) -> "DiTModel":
        """
        Make a new model of a published size that learns its variance.

        Args:
            name (`str`): A key of `presets`: 'DiT-S/2' to 'DiT-XL/8', or as the subclass calls them.
            config: Arguments of the constructor, which override the preset's.

        Returns:
            [`DiTModel`]: A model of the class that this is called on.

        Raises:
            ValueError: if there is no such preset; the message lists them.
        """
        config = cls.preset_config(name) | config
        config.setdefault("out_channels", 2 * config.get("in_channels", 4))
        return cls(**config)

    @classmethod
    def preset_config(cls, name: str) -> dict[str, int]:
        """
        Look up the constructor's arguments of a published size.

        Args:
            name (`str`): A key of `presets`.

        Returns:
            `dict[str, int]`: The arguments that the size determines.

        Raises:
            ValueError: if there is no such preset; the message lists them.
        """
        if name not in cls.presets:
            raise ValueError(f"Expected `name` to be one of {', '.join(cls.presets)}, but got {name!r}.")
        return dict(cls.presets[name])

    def initialize_weights(self) -> None:
        """Initialise as published: every block starts as the identity, and the output as zero."""
        zeroed = [self.proj_out_1, self.proj_out_2]
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, AdaLayerNormZero):
                zeroed.append(module.linear)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))  # the convolution as a matrix
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.time_label_embed.class_embedder.weight, std=0.02)
        nn.init.normal_(self.time_label_embed.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_label_embed.timestep_embedder.linear_2.weight, std=0.02)
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def make_block(self, *sizes: Any) -> DiTBlock:
        """
        Make one of `transformer_blocks`. Subclasses return a block of their own.

        Args:
            sizes: The arguments of [`DiTBlock`].

        Returns:
            [`DiTBlock`]: The block.
        """
        return DiTBlock(*sizes)

    def choose(self, timestep: torch.Tensor) -> tuple:
        """
        Choose by the values of the timesteps what must be known before a pass, which may be compiled. Subclasses do.

        Args:
            timestep (`torch.Tensor` of shape (B,) or (1,)): In steps of the training schedule, on any device.

        Returns:
            `tuple`: What [`~DiTModel.block_inputs`] gets after its other arguments; empty here.
        """
        return ()

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype, *chosen: Any) -> tuple:
        """
        Compute what every block gets besides tokens and conditioning. Subclasses return inputs of their own blocks.

        Args:
            timestep (`torch.Tensor` of shape (B,) or (1,)): In steps of the training schedule, on the tokens' device.
            dtype (`torch.dtype`): The dtype of the tokens.
            chosen: See [`~DiTModel.choose`].

        Returns:
            `tuple`: Empty here.
        """
        return ()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """
        Compile the forward pass, all but the checks of its inputs and the choice of an expert, which read values.

        So nothing is compiled again when the expert changes. A copy of the model is not compiled.

        Args:
            args, kwargs: The arguments of [`torch.compile`].
        """
        self._compiled_denoise = torch.compile(self._denoise, *args, **kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether [`~DiTModel.compile`] was called."""
        return self._compiled_denoise is not None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_compiled_denoise", None)
        return state

    @torch.no_grad()
    def modulations_at(self, timesteps: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """
        Compute the modulations of all blocks for several timesteps at once, as `modulations` of later calls.

        A third of the weights is then read once, and not once at each timestep. Without label dropout: for eval mode.

        Args:
            timesteps (`torch.Tensor` of shape (S,)): In steps of the training schedule.
            class_labels (`torch.LongTensor` of shape (B,)): As in [`~DiTModel.forward`]; (1,) for a batch that shares its label.

        Returns:
            `torch.Tensor` of shape (S, L, 6, B, 1, D) for L blocks; the item of a step is what `forward` takes.

        Raises:
            ValueError: if (on the CPU) a timestep or label is out of range.
        """
        check_timesteps(timesteps, self.config.num_train_timesteps)
        class_labels = to_device(self._checked_labels(class_labels, class_labels), self.device)
        timesteps = to_device(timesteps, self.device)
        sizes = len(timesteps), len(class_labels)
        # c of (t₀, y₀), (t₀, y₁), …, (t₁, y₀), …
        conditioning = self.time_label_embed(
            timesteps.repeat_interleave(sizes[1]), class_labels.repeat(sizes[0])
        )  # (S·B, D)
        blocks: Any = self.transformer_blocks
        return modulations_of(blocks, conditioning, sizes)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        force_drop_ids: torch.Tensor | None = None,
        return_dict: bool = True,
        modulations: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Predict what the model was trained to predict: for DiT the noise, and its variance.

        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): Noisy images or latents.
            timestep (`torch.Tensor` of shape (B,), (1,) or (), `int` or `float`): In steps of the training schedule, on
                any device. A batch that shares its timestep is fastest with one number, or one number expanded to (B,).
            class_labels (`torch.LongTensor` of shape (B,), *optional*): In [0, num_classes], on any device. If None, the
                null class, or the only class.
            force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Which labels become the null class. If None,
                random ones in training, and none otherwise.
            return_dict (`bool`): Whether to return a dataclass or a tuple.
            modulations (`torch.Tensor` of shape (L, 6, B or 1, 1, D), *optional*): Those of the L blocks at this timestep, as
                [`~DiTModel.modulations_at`] computes them for many timesteps at once. Without gradients only.

        Returns:
            [`Transformer2DModelOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: if H or W is not divisible by the patch size, the channels are not C, there are neither one nor B
                timesteps, (on the CPU) a timestep or label is out of range, or `modulations` have another shape or are given
                where gradients are enabled.
        """
        self._check_images(hidden_states)
        self._check_modulations(modulations, hidden_states)
        timestep = checked_timestep(timestep, len(hidden_states), self.config.num_train_timesteps)
        chosen = self.choose(timestep)
        timestep = to_device(timestep, hidden_states.device)
        class_labels = self._checked_labels(class_labels, hidden_states)
        sample = self._run(hidden_states, timestep, class_labels, force_drop_ids, modulations, chosen)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, *inputs: Any) -> torch.Tensor:
        """Call [`_denoise`], or what it was compiled to."""
        compiled = self._compiled_denoise
        return self._denoise(*inputs) if compiled is None else compiled(*inputs)

    def _denoise(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        force_drop_ids: torch.Tensor | None,
        modulations: torch.Tensor | None,
        chosen: tuple,
    ) -> torch.Tensor:
        """Compute (B, C, H, W) → (B, out_channels, H, W) from inputs that were checked and are on one device."""
        height, width = hidden_states.shape[2:]

        # 1. Input
        # (B, C, H, W) → (B, N, D), in the weights' dtype, so that the residual stream stays in float32 under autocast;
        # contiguous, as the patch embedding's transposed memory layout would slow down every block
        hidden_states = self.pos_embed(hidden_states).to(self.pos_embed.proj.weight.dtype).contiguous()
        conditioning = self.time_label_embed(timestep, class_labels, force_drop_ids)  # (B, D)
        block_inputs = self.block_inputs(timestep, hidden_states.dtype, *chosen)

        # 2. Blocks
        hidden_states = self._apply_blocks(hidden_states, conditioning, block_inputs, modulations)

        # 3. Output
        shift, scale = self.proj_out_1(F.silu(conditioning))[:, None].chunk(2, dim=-1)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)
        hidden_states = self.proj_out_2(hidden_states)  # (B, N, p·p·C_out)
        return unpatchify(hidden_states, height, width, self.config.patch_size)

    def _apply_blocks(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        block_inputs: tuple,
        modulations: torch.Tensor | None,
    ) -> torch.Tensor:
        """Apply all blocks, (B, N, D) → (B, N, D)."""
        for block, own in self._blocks_with(modulations):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, *block_inputs)
            else:
                hidden_states = block(hidden_states, conditioning, *block_inputs, **own)
        return hidden_states

    def _blocks_with(self, modulations: torch.Tensor | None) -> Iterable[tuple[nn.Module, dict[str, Any]]]:
        """Each block with its `modulation`, if it is known."""
        if modulations is None:
            return [(block, {}) for block in self.transformer_blocks]
        return [(block, {"modulation": own}) for block, own in zip(self.transformer_blocks, modulations)]

    def _checked_labels(self, class_labels: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        num_rows = self.time_label_embed.class_embedder.num_embeddings
        return checked_labels(class_labels, self.config.num_classes, num_rows, hidden_states)

    def _check_images(self, hidden_states: torch.Tensor) -> None:
        channels, height, width = hidden_states.shape[1:]
        if channels != self.config.in_channels:
            raise ValueError(
                f"Expected `hidden_states` to have the {self.config.in_channels} channels of `in_channels`, "
                f"but got {channels}."
            )
        if height % self.config.patch_size or width % self.config.patch_size:
            raise ValueError(
                f"Expected the height and width of `hidden_states` to be divisible by the `patch_size` "
                f"{self.config.patch_size}, but got {height} x {width}."
            )

    def _check_modulations(self, modulations: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        check_modulations(modulations, len(self.transformer_blocks), len(hidden_states), dim)
