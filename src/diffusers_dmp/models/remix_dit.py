"""Remix-DiT: N experts, each a mixture of K sets of weights, at the cost of one DiT.
https://arxiv.org/abs/2412.05628

Legend: B batch, D width, K bases, E experts, G the experts at work in a batch.
"""

import inspect
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from ..intervals import NoiseIntervals, group_by_expert
from ..saving.naming import PACKAGE
from .caching import tensor_state
from .dit.model import DIT_PRESETS, DiTModel
from .inputs import checked_labels
from .loading import check_weights, in_dtype
from .remix_layers import BasisLinear, RemixBlock, mix

REMIX_DIT_PRESETS = {f"Remix{name}": config for name, config in DIT_PRESETS.items()}
PRIOR_SCALE = 3.0  # of the prior in the initial logits, in standard deviations of the noise on it


@dataclass
class RemixDiTModelOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape (B, out_channels, H, W)): What the model predicts.
        prior_loss (`torch.Tensor` of shape (), *optional*): [`~RemixDiTModel.prior_loss`], in training mode.
    """

    sample: torch.Tensor
    prior_loss: torch.Tensor | None = None


class RemixDiTModel(DiTModel):
    """
    Remix-DiT (https://arxiv.org/abs/2412.05628): the linear layers of the blocks come in K bases, and each of N
    experts, which own equal stretches of the timesteps, mixes them by N x K learned coefficients.

    Without gradients (in sampling) the mixture of the expert at work is kept until another expert is: one copy more of
    those layers. It is mixed anew after a forward pass with gradients, `train()`, `eval()`, `load_state_dict`, `to()`, and
    every in-place change that PyTorch counts. Call `eval()` after those that it does not count: through `parameter.data`,
    as Diffusers' `EMAModel.copy_to` makes them, and of parameters that were made under `inference_mode`. Hence a model
    serves one call at a time.

    `compile_repeated_blocks()` compiles with the kept mixture; `torch.compile(model)` mixes at every call, and for a batch
    of several timesteps once for each sample. Where the weights are offloaded, they are mixed at every call as well.

    Args:
        num_bases (`int`): K. One basis is the plain DiT.
        num_experts (`int`): N. The last one takes the rest of the timesteps where it does not divide them.

    The other arguments are those of [`DiTModel`].

    Raises:
        ValueError: as [`DiTModel`] does, and for less than one basis or expert.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _no_split_modules = ["RemixBlock"]
    _repeated_blocks = ["RemixBlock"]

    presets = REMIX_DIT_PRESETS

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
        num_bases: int = 4,
        num_experts: int = 8,
    ):
        if num_bases < 1:
            raise ValueError(f"Expected `num_bases` to be at least 1, but got {num_bases}.")
        intervals = NoiseIntervals.uniform(num_experts, num_train_timesteps, last_takes_rest=True)
        if num_bases > num_experts:
            warnings.warn(
                f"Expected no more `num_bases` than `num_experts`, but got {num_bases} for {num_experts}: some bases "
                "have no expert to begin with.",
                stacklevel=3,
            )
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
        self.intervals = intervals
        # the prior: expert i begins with basis ⌊i·K/N⌋
        prior = torch.arange(num_experts) * num_bases // num_experts
        self.register_buffer("prior", prior, persistent=False)  # (E,)
        prior_logits = PRIOR_SCALE * F.one_hot(prior, num_bases).float()
        self.mixing_logits = nn.Parameter(torch.randn(num_experts, num_bases) + prior_logits)
        self._held_state = self._held_tensors = None

    def make_block(self, *sizes) -> RemixBlock:
        return RemixBlock(*sizes, num_bases=self.config.num_bases)

    @classmethod
    def from_dit(
        cls, model: "DiTModel | DiTTransformer2DModel", num_bases: int = 4, num_experts: int = 8, **config
    ) -> "RemixDiTModel":
        """
        Copy a pretrained DiT into every basis, so that every expert equals it to begin with.

        Args:
            model ([`DiTModel`] or Diffusers' [`DiTTransformer2DModel`]): For an original checkpoint, what
                [`convert_checkpoint`] makes of it. Diffusers' own keeps its semantics (see [`DiTModel`]).
            num_bases (`int`): K.
            num_experts (`int`): N.
            config: The sizes that the model is expected to have, or other arguments of the constructor.

        Raises:
            ValueError: if `model` is no plain DiT, or its weights are of other sizes than `config` says; the first
                that is, is named.
        """
        if isinstance(model, DiTTransformer2DModel):
            model = DiTModel.from_diffusers(model)
        if type(model) is not DiTModel:
            raise ValueError(f"Expected `model` to be a plain DiT, but got a {type(model).__name__}.")
        config = _dit_config(model) | config
        weights = model.state_dict()
        with torch.device("meta"):
            check_weights(DiTModel(**config), weights, "model")
        remix = cls(**config, num_bases=num_bases, num_experts=num_experts)
        for name in remix.basis_names():
            weights[name] = weights[name].expand(num_bases, *weights[name].shape)
        remix.load_state_dict(weights | {"mixing_logits": remix.mixing_logits})
        return in_dtype(remix, model.dtype).to(model.device).eval()

    @classmethod
    def from_diffusers(
        cls, stock_model_or_path, num_bases: int = 4, num_experts: int = 8, **kwargs
    ) -> "RemixDiTModel":
        """Diffusers' own DiT in every basis; see [`~DiTModel.from_diffusers`] and [`~RemixDiTModel.from_dit`]."""
        return cls.from_dit(DiTModel.from_diffusers(stock_model_or_path, **kwargs), num_bases, num_experts)

    def to_diffusers(self, approximate: bool = False) -> nn.Module:
        """
        Raises:
            ValueError: always, as the stock class cannot mix.
        """
        raise ValueError(
            "Expected a model that one stock model can express, but got a RemixDiTModel: export its experts, by "
            "`bake_expert(i).to_diffusers()` or `to_diffusers_experts`."
        )

    def bake_expert(self, expert: int) -> DiTModel:
        """
        A plain [`DiTModel`] with the weights of one expert, in eval mode.

        Raises:
            ValueError: if there is no such expert.
        """
        self._check_expert(expert)
        coefficients = self.mixing_coefficients[expert : expert + 1].detach()
        weights = self.state_dict()
        del weights["mixing_logits"]
        for name in self.basis_names():
            weights[name] = mix(weights[name], coefficients).squeeze(0)
        model = DiTModel(**_dit_config(self))
        model.load_state_dict(weights)
        return in_dtype(model, self.dtype).to(self.device).eval()

    def basis_names(self) -> list[str]:
        """The entries of the state dict that come in K bases."""
        # by a mark, not by class: see naming.py
        linears = [name for name, module in self.named_modules() if getattr(module, "has_bases", False)]
        return [f"{name}.{part}" for name in linears for part in ("weight", "bias")]

    @property
    def mixing_coefficients(self) -> torch.Tensor:
        """Softmax of the logits: (E, K) in float32, the rows summing to 1."""
        return self.mixing_logits.float().softmax(dim=1)

    def prior_loss(self) -> torch.Tensor:
        """
        Cross-entropy of the mixing coefficients against the prior, which gives basis ⌊i·K/N⌋ to expert i: keeps the
        experts apart early in training. In nats, of shape ().
        """
        return F.cross_entropy(self.mixing_logits.float(), self.prior)

    def initialize_weights(self) -> None:
        """As a DiT's, every basis on its own."""
        super().initialize_weights()
        for linear in self.basis_linears:
            linear.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.LongTensor | None = None,
        force_drop_ids: torch.BoolTensor | None = None,
        return_dict: bool = True,
        expert: int | None = None,
    ) -> RemixDiTModelOutput | tuple[torch.Tensor, ...]:
        """
        As [`DiTModel.forward`]. Each sample meets the expert of its own timestep, whatever the others' are.

        Args:
            expert (`int`, *optional*): The one that owns all of the batch's timesteps, for who knows. Otherwise the
                timesteps are looked at: give them on the CPU, as an accelerator would have to be waited for.

        Returns:
            [`RemixDiTModelOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: as [`DiTModel.forward`] does, if there is no such expert, or (timesteps on the CPU) if another
                owns a timestep.
        """
        self._check_input(hidden_states)
        timestep = self._check_timestep(timestep, len(hidden_states))
        num_rows = self.time_label_embed.class_embedder.num_embeddings
        class_labels = checked_labels(class_labels, self.config.num_classes, num_rows, hidden_states)
        order, block_inputs = self._experts_at_work(timestep, hidden_states, expert)
        timestep = timestep.to(hidden_states.device, non_blocking=True)
        if order is None:
            sample = self._denoise(hidden_states, timestep, class_labels, force_drop_ids, block_inputs)
        else:
            order = order.to(hidden_states.device, non_blocking=True)
            drop_ids = None if force_drop_ids is None else force_drop_ids[order]
            sample = self._denoise(hidden_states[order], timestep[order], class_labels[order], drop_ids, block_inputs)
            sample = sample[order.argsort()]
        output = RemixDiTModelOutput(sample=sample, prior_loss=self.prior_loss() if self.training else None)
        return output if return_dict else output.to_tuple()

    def _experts_at_work(
        self, timestep: torch.Tensor, hidden_states: torch.Tensor, expert: int | None
    ) -> tuple[torch.LongTensor | None, tuple]:
        """An order (B,) in which an expert's samples are neighbours, if there are several experts; the blocks' inputs."""
        compiling = torch.compiler.is_compiling()
        batch_size, device = len(hidden_states), hidden_states.device
        experts = self.intervals.index(timestep)  # (B,), or (1,) for a batch that shares its timestep
        if expert is not None:
            self._check_expert(expert)
            if experts.is_cpu and not compiling and (experts != expert).any():
                raise ValueError(f"Expected `timestep` to belong to `expert` {expert}, but got {timestep.tolist()}.")
        elif compiling:  # the timesteps' values are not known: a group for each of them
            group_sizes = [batch_size // len(experts)] * len(experts)
            return None, (self.mixing_coefficients[experts.to(device, non_blocking=True)], group_sizes)
        elif len(experts) == 1:
            expert = experts.item()
        else:
            order, present, group_sizes = group_by_expert(experts)
            if len(present) > 1:
                coefficients = self.mixing_coefficients[torch.tensor(present).to(device, non_blocking=True)]
                return order, (coefficients, group_sizes)
            (expert,) = present

        if torch.is_grad_enabled() or compiling or not self._hold_expert(expert, device):
            return None, (self.mixing_coefficients[expert : expert + 1], [batch_size])
        return None, ()

    def _hold_expert(self, expert: int, device: torch.device) -> bool:
        """
        Have the layers hold that expert's mixture, if they do not. Not if weights are offloaded: those come when their
        layer is called, where they are mixed then.
        """
        linears = self.basis_linears
        tensors = [self.mixing_logits, *(tensor for linear in linears for tensor in (linear.weight, linear.bias))]
        state = [expert, *map(tensor_state, tensors)]
        if state == self._held_state and all(linear.holds for linear in linears):
            return True
        if any(tensor.device.type != device.type for tensor in tensors):
            return False
        coefficients = self.mixing_coefficients[expert : expert + 1]
        for linear in linears:
            linear.hold(coefficients)
        self._held_state, self._held_tensors = state, tensors  # alive, they are the only ones with their ids
        return True

    @property
    def basis_linears(self) -> list[BasisLinear]:
        """The layers that come in K bases."""
        return [linear for block in self.transformer_blocks for linear in block.basis_linears]

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"Expected `expert` to be in [0, {self.config.num_experts}), but got {expert}.")


def _dit_config(model: DiTModel) -> dict:
    """The constructor's arguments that every DiT has."""
    return {name: model.config[name] for name in inspect.signature(DiTModel.__init__).parameters if name != "self"}
