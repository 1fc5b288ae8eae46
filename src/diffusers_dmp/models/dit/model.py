"""The plain DiT: what DTR and Remix-DiT build on, DMP patches, and every comparison starts from.
https://arxiv.org/abs/2212.09748

Legend: B batch, C channels, H and W height and width in (latent) pixels, p patch size, N = H/p · W/p tokens, D width.
"""

import os

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ...intervals import check_timesteps
from ...saving.mixins import StandaloneModelMixin
from ...saving.naming import PACKAGE
from ..inputs import checked_labels, shared_or_per_sample
from ..loading import in_dtype
from .layers import DiTBlock, TimestepLabelEmbedding
from .stock_layout import STOCK_CLASSES, config_from_stock, load_stock, stock_from_dit, weights_from_stock

# (layers, width, heads) of Table 1; the number behind the slash is the patch size
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PRESETS = {
    f"DiT-{size}/{patch_size}": {
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "patch_size": patch_size,
    }
    for size, (num_layers, width, num_heads) in DIT_SIZES.items()
    for patch_size in (2, 4, 8)
}


class DiTModel(StandaloneModelMixin, ModelMixin, ConfigMixin, AttentionMixin):
    r"""
    DiT (https://arxiv.org/abs/2212.09748) with one embedder for all blocks, as it was published.

    Argument names are those of Diffusers' [`DiTTransformer2DModel`], whose weights load through
    [`~DiTModel.from_diffusers`]. The two differ in two constants, so that equal weights give outputs some 3 % apart. Both semantics are here:

    | | `downscale_freq_shift` | `norm_eps` |
    | --- | --- | --- |
    | published DiT (default) | 0 | 1e-6 |
    | stock Diffusers | 1 | 1e-5 |

    Args:
        num_attention_heads (`int`), attention_head_dim (`int`): Their product is the width D.
        in_channels (`int`): C, of the (latent) images.
        out_channels (`int`, *optional*): C by default; 2C for a model that learns its variance as well.
        num_layers (`int`): The number of blocks.
        dropout (`float`): Of the feed-forward layers.
        sample_size (`int`): Height and width of the training images. Others can be sampled: the positions are
            recomputed, stretched to the trained range.
        patch_size (`int`): p.
        norm_eps (`float`): Of the LayerNorm before each feed-forward layer (see the table).
        num_classes (`int`): The null class has the index `num_classes`. An unconditional model has one class and no
            label dropout.
        class_dropout_prob (`float`): How often training replaces a label by the null class; 0 for a model without it.
        num_train_timesteps (`int`): T of the training noise schedule.
        downscale_freq_shift (`float`): Of the timestep frequencies 10000^(-i / (128 - shift)) (see the table).

    Raises:
        ValueError: if a number is not positive, `class_dropout_prob` lies outside [0, 1], or D is not a multiple of 4.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    presets = DIT_PRESETS

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
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        _check_config(self.config, dim)

        # 1. Input
        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        self.time_label_embed = TimestepLabelEmbedding(dim, num_classes, class_dropout_prob, downscale_freq_shift)

        # 2. Blocks
        self.transformer_blocks = nn.ModuleList(
            [self.make_block(dim, num_attention_heads, dropout, norm_eps) for _ in range(num_layers)]
        )

        # 3. Output
        self.norm_out = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, patch_size**2 * self.out_channels)

        self.gradient_checkpointing = False
        self.initialize_weights()

    @classmethod
    def from_preset(cls, name: str, **config) -> "DiTModel":
        """
        A new model of a published size, one of `presets`, that learns its variance.

        Args:
            name (`str`): Size and patch size: 'DiT-S/2' to 'DiT-XL/8', or as the subclass calls them.
            config: Overrides of any argument of the constructor.

        Raises:
            ValueError: if there is no such preset; the message lists them.
        """
        config = cls.preset_config(name) | config
        config.setdefault("out_channels", 2 * config.get("in_channels", 4))
        return cls(**config)

    @classmethod
    def preset_config(cls, name: str) -> dict[str, int]:
        """The arguments of the constructor that a preset stands for; see [`~DiTModel.from_preset`]."""
        if name not in cls.presets:
            raise ValueError(f"Expected `name` to be one of {', '.join(cls.presets)}, but got {name!r}.")
        return dict(cls.presets[name])

    @classmethod
    def from_diffusers(cls, stock_model_or_path: "nn.Module | str | os.PathLike", **kwargs) -> "DiTModel":
        """
        Load Diffusers' own DiT, under its own ("stock") semantics: the outputs equal the stock model's. (A subclass gets
        the weights, and its own arguments' defaults.)

        Args:
            stock_model_or_path (`DiTTransformer2DModel`, `str` or `os.PathLike`): The model, its folder, or its Hub id.
            kwargs: `subfolder`, `torch_dtype`, … for `DiTTransformer2DModel.from_pretrained`, if a path was given.

        Raises:
            ValueError: if the blocks' embedders differ from one another (they are copies in every published
                checkpoint), so that one shared embedder cannot stand for them.
        """
        stock = load_stock(stock_model_or_path, **kwargs)
        model = cls(**config_from_stock(stock.config))
        model.load_state_dict(weights_from_stock(stock.state_dict()))
        return in_dtype(model, stock.dtype).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike", **kwargs) -> "DiTModel":
        """As every Diffusers model's; a checkpoint of the stock class goes through [`~DiTModel.from_diffusers`]."""
        where = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in kwargs}
        if cls.load_config(pretrained_model_name_or_path, **where).get("_class_name") in STOCK_CLASSES:
            return cls.from_diffusers(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def to_diffusers(self, approximate: bool = False) -> nn.Module:
        """
        Export to Diffusers' own [`DiTTransformer2DModel`], usable without this package.

        Exact for a model with the stock semantics alone. A model with the published semantics has other timestep
        frequencies than the stock class can be configured to; its export equals this model again after

        ```py
        for block in stock.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        ```

        (the LayerNorm eps is saved in the stock configuration and needs no such line).

        Args:
            approximate (`bool`): Export in spite of the other frequencies.

        Raises:
            ValueError: if the semantics are not the stock ones and `approximate` is not set.
        """
        return stock_from_dit(self, approximate)

    def initialize_weights(self) -> None:
        """The published initialisation: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))  # the convolution as a matrix
        nn.init.zeros_(self.pos_embed.proj.bias)
        nn.init.normal_(self.time_label_embed.class_embedder.weight, std=0.02)
        nn.init.normal_(self.time_label_embed.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_label_embed.timestep_embedder.linear_2.weight, std=0.02)
        for zeroed in (*(block.norm1.linear for block in self.transformer_blocks), self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(zeroed.weight)
            nn.init.zeros_(zeroed.bias)

    def make_block(self, dim: int, heads: int, dropout: float, norm_eps: float) -> DiTBlock:
        """One of `transformer_blocks`; subclasses have their own."""
        return DiTBlock(dim, heads, dropout, norm_eps)

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """What every block gets besides tokens and conditioning: nothing here; subclasses route by timestep."""
        return ()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.LongTensor | None = None,
        force_drop_ids: torch.BoolTensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, C, H, W)): Noisy images, or latents.
            timestep (`torch.Tensor` of shape (B,), (1,) or (), `int` or `float`): In steps of the training schedule, on
                any device. A batch that shares its timestep is fastest with one number, or one number expanded to (B,).
            class_labels (`torch.LongTensor` of shape (B,), *optional*): In [0, num_classes], on any device; the null
                class, if there is one, when it is left out.
            force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Labels to drop; random in training if not given.
            return_dict (`bool`): Whether to return a dataclass or a tuple.

        Returns:
            [`Transformer2DModelOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: if H or W is not divisible by the patch size, the channels are not C, there are neither one nor
                B timesteps, or (on the CPU) a timestep or label is out of range.
        """
        self._check_input(hidden_states)
        timestep = self._check_timestep(timestep, len(hidden_states))
        timestep = timestep.to(hidden_states.device, non_blocking=True)
        num_rows = self.time_label_embed.class_embedder.num_embeddings
        class_labels = checked_labels(class_labels, self.config.num_classes, num_rows, hidden_states)
        block_inputs = self.block_inputs(timestep, self.pos_embed.proj.weight.dtype)
        sample = self._denoise(hidden_states, timestep, class_labels, force_drop_ids, block_inputs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _denoise(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.LongTensor,
        force_drop_ids: torch.BoolTensor | None,
        block_inputs: tuple,
    ) -> torch.Tensor:
        """(B, C, H, W) → (B, out_channels, H, W), from checked inputs on one device."""
        height, width = hidden_states.shape[2:]

        # 1. Input
        # (B, C, H, W) → (B, N, D), in the weights' precision, so that under autocast the residual stream keeps float32; the
        # embedding's transposed memory layout would spread through every block
        hidden_states = self.pos_embed(hidden_states).to(self.pos_embed.proj.weight.dtype).contiguous()
        conditioning = self.time_label_embed(timestep, class_labels, force_drop_ids)  # (B, D)

        # 2. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, *block_inputs)
            else:
                hidden_states = block(hidden_states, conditioning, *block_inputs)

        # 3. Output
        shift, scale = self.proj_out_1(F.silu(conditioning))[:, None].chunk(2, dim=-1)
        hidden_states = torch.addcmul(shift, self.norm_out(hidden_states), 1 + scale)
        hidden_states = self.proj_out_2(hidden_states)  # (B, N, p·p·C_out)
        return unpatchify(hidden_states, height, width, self.config.patch_size)

    def _check_timestep(self, timestep: torch.Tensor | float | int, batch_size: int) -> torch.Tensor:
        """(1,) for a batch that shares its timestep, else (B,); on the device where it came from."""
        timestep = torch.as_tensor(timestep)
        check_timesteps(timestep, self.config.num_train_timesteps)
        timestep = shared_or_per_sample(timestep)
        if len(timestep) not in (1, batch_size):
            raise ValueError(f"Expected `timestep` to be one or {batch_size}, but got {len(timestep)} of them.")
        return timestep

    def _check_input(self, hidden_states: torch.Tensor) -> None:
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


def unpatchify(hidden_states: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """(B, N, p·p·C) tokens, row by row → (B, C, H, W)."""
    hidden_states = hidden_states.unflatten(1, (height // patch_size, width // patch_size))
    hidden_states = hidden_states.unflatten(-1, (patch_size, patch_size, -1))  # (B, H/p, W/p, p, p, C)
    return torch.einsum("bhwpqc->bchpwq", hidden_states).reshape(len(hidden_states), -1, height, width)


def _check_config(config, dim: int) -> None:
    for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
                 "num_classes", "num_train_timesteps"):  # fmt: skip
        if config[name] < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {config[name]}.")
    if dim % 4:
        raise ValueError(f"Expected the width, heads times `attention_head_dim`, to be divisible by 4, but got {dim}.")
    if config.sample_size % config.patch_size:
        raise ValueError(
            f"Expected `sample_size` to be divisible by the `patch_size` {config.patch_size}, but got {config.sample_size}."
        )
    if not 0 <= config.class_dropout_prob <= 1:
        raise ValueError(f"Expected `class_dropout_prob` to be in [0, 1], but got {config.class_dropout_prob}.")
