"""Remix-DiT: E experts, each a mixture of K sets of weights, at the cost of one DiT.
https://arxiv.org/abs/2412.05628

Legend: B batch, K bases, E experts (the paper's N), G experts at work in a batch, T training timesteps.
"""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

from ..intervals import NoiseIntervals, group_by_expert
from ..saving.naming import PACKAGE
from .caching import TensorSnapshot
from .compiled_modules import is_compiled_in_place
from .configuration import extends_arguments
from .dit.configuration import DIT_PRESETS
from .dit.model import DiTModel
from .inputs import checked_timestep, to_device
from .remix_adapters import RemixAdaptersMixin
from .remix_conversion import RemixConversionMixin
from .remix_layers import BasisLinear, RemixBlock

REMIX_DIT_PRESETS = {f"Remix{name}": config for name, config in DIT_PRESETS.items()}
PRIOR_SCALE = 3.0  # of the prior in the initial logits, in standard deviations of the noise added to it


@dataclass
class RemixDiTModelOutput(BaseOutput):
    """
    What a [`RemixDiTModel`] returns.

    Args:
        sample (`torch.Tensor` of shape (B, out_channels, H, W)): What the model predicts.
        prior_loss (`torch.Tensor` of shape (), *optional*): [`~RemixDiTModel.prior_loss`], in training mode.
    """

    sample: torch.Tensor
    prior_loss: torch.Tensor | None = None


class RemixDiTModel(RemixAdaptersMixin, RemixConversionMixin):
    """
    Remix-DiT (https://arxiv.org/abs/2412.05628): every expert owns an interval of timesteps and mixes K bases.

    The linear layers of the blocks have K sets of weights, the bases. An expert's weights are their sum, weighted by the
    expert's learned coefficients.

    Without gradients (in sampling) the weights of the expert at work are fused once, when it takes over from another one,
    and cached: one more copy of those layers, which stays where it is for all experts, as CUDA graphs need it, until
    [`~RemixDiTModel.unfuse_expert`] frees it. Hence a model serves one call at a time. The weights are fused again after a
    call with gradients, `train()`, `eval()`, `load_state_dict`, `to()`, and every in-place change that PyTorch counts. It does
    not count changes through `parameter.data`, such as Diffusers' `EMAModel.copy_to` makes, nor those of a model that was made
    under `torch.inference_mode()`: call [`~RemixDiTModel.unfuse_expert`] after these.

    `compile()` and `compile_repeated_blocks()` compile one graph for all experts, in sampling with the fused weights; a batch
    of several experts is computed eagerly then. `torch.compile(model)` mixes in every call, and for a batch of several
    timesteps once for each sample. Weights that are offloaded layer by layer are mixed in every call, too.

    Args:
        num_bases (`int`): K. With one basis the model is the plain DiT.
        num_experts (`int`): E.
        interval_edges (`list[float]` of length E + 1, *optional*): Where the experts' intervals begin and end, in
            timesteps: ascending, from 0 to T. If None, E intervals of ⌊T/E⌋ timesteps each, where the last one also has
            the rest. The configuration always holds the edges.
        parent_arguments: The arguments of [`DiTModel`], which come first in the signature.

    Raises:
        ValueError: as [`DiTModel`] does, for less than one basis or expert, and for edges that do not fit the number of
            experts or timesteps.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _no_split_modules = ["RemixBlock"]
    _repeated_blocks = ["RemixBlock"]

    presets = REMIX_DIT_PRESETS
    prior: torch.Tensor

    @register_to_config
    @extends_arguments(DiTModel)
    def __init__(
        self,
        *,
        num_bases: int = 4,
        num_experts: int = 8,
        interval_edges: "list[float] | None" = None,
        **parent_arguments: Any,
    ):
        if num_bases < 1:
            raise ValueError(f"Expected `num_bases` to be at least 1, but got {num_bases}.")
        intervals = _make_intervals(num_experts, parent_arguments["num_train_timesteps"], interval_edges)
        if num_bases > num_experts:
            warnings.warn(
                f"Expected no more `num_bases` than `num_experts`, but got {num_bases} for {num_experts}: some bases "
                "have no expert to begin with.",
                stacklevel=4,
            )
        super().__init__(**parent_arguments)
        self.intervals = intervals
        self.register_to_config(interval_edges=intervals.to_config())
        # the prior: expert i begins with basis ⌊i·K/E⌋
        prior = torch.arange(num_experts) * num_bases // num_experts
        self.register_buffer("prior", prior, persistent=False)  # (E,)
        prior_logits = PRIOR_SCALE * F.one_hot(prior, num_bases).float()
        self.mixing_logits = nn.Parameter(torch.randn(num_experts, num_bases) + prior_logits)
        self._fused_expert: int | None = None
        self._fused_from: TensorSnapshot | None = None

    def make_block(self, *sizes: Any) -> RemixBlock:
        """See [`DiTModel.make_block`]."""
        return RemixBlock(*sizes, num_bases=self.config.num_bases)

    def basis_names(self) -> list[str]:
        """
        List the weights that come in K bases.

        Returns:
            `list[str]`: Their names in the state dict.
        """
        # recognised by an attribute, not by class: see naming.py
        linears = [name for name, module in self.named_modules() if getattr(module, "has_bases", False)]
        return [f"{name}.{part}" for name in linears for part in ("weight", "bias")]

    @property
    def basis_linears(self) -> list[BasisLinear]:
        """The layers that come in K bases."""
        blocks: Any = self.transformer_blocks
        return [linear for block in blocks for linear in block.basis_linears]

    @property
    def mixing_coefficients(self) -> torch.Tensor:
        """The softmax of the logits: (E, K) in float32, where every row sums to 1."""
        return self.mixing_logits.float().softmax(dim=1)

    def prior_loss(self) -> torch.Tensor:
        """
        Compute the cross-entropy of the mixing coefficients against the prior, which gives basis ⌊i·K/E⌋ to expert i.

        It keeps the experts apart early in training.

        Returns:
            `torch.Tensor` of shape (): In nats.
        """
        return F.cross_entropy(self.mixing_logits.float(), self.prior)

    def initialize_weights(self) -> None:
        """Initialise as a DiT, every basis by itself."""
        super().initialize_weights()
        for linear in self.basis_linears:
            linear.reset_parameters()

    @torch.no_grad()
    def fuse_expert(self, expert: int) -> bool:
        """
        Cache the weights of one expert, unless they are cached and up to date.

        Calls without gradients do this by themselves. It does not change what the model computes: a call with timesteps of
        another expert uses that expert's weights.

        Args:
            expert (`int`): In [0, E).

        Returns:
            `bool`: Whether they are cached now. False if layers are offloaded, so that their weights are on the device only
            while they are called.

        Raises:
            ValueError: if there is no such expert.
        """
        self._check_expert(expert)
        linears = self.basis_linears
        tensors = [self.mixing_logits, *(tensor for linear in linears for tensor in (linear.weight, linear.bias))]
        is_current = expert == self._fused_expert and all(linear.is_fused for linear in linears)
        if is_current and self._fused_from is not None and self._fused_from.matches(tensors):
            return True
        if any(tensor.device.type != self.mixing_logits.device.type for tensor in tensors):
            return False
        self._fused_expert = None  # what is interrupted between two layers leaves weights of two experts
        coefficients = self.mixing_coefficients[expert : expert + 1].to(linears[0].weight.dtype)
        for linear in linears:
            linear.fuse(coefficients)
        self._fused_expert, self._fused_from = expert, TensorSnapshot(tensors)
        return True

    def unfuse_expert(self) -> None:
        """Drop the cached weights, to free their memory, or after a change of weights that PyTorch does not count."""
        for linear in self.basis_linears:
            linear.unfuse()
        self._fused_expert = self._fused_from = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        force_drop_ids: torch.Tensor | None = None,
        return_dict: bool = True,
        modulations: torch.Tensor | None = None,
        expert: int | None = None,
    ) -> RemixDiTModelOutput | tuple[torch.Tensor, ...]:
        """
        Predict as [`DiTModel.forward`], each sample with the expert of its own timestep.

        Args:
            expert (`int`, *optional*): The expert that owns all timesteps of the batch. If None, computed from `timestep`;
                pass CPU timesteps to avoid a device sync.

        The other arguments are those of [`DiTModel.forward`].

        Returns:
            [`RemixDiTModelOutput`] with `sample` of shape (B, out_channels, H, W).

        Raises:
            ValueError: as [`DiTModel.forward`] does, if there is no such expert, or (timesteps on the CPU) if another expert
                owns a timestep.
        """
        self._check_images(hidden_states)
        self._check_modulations(modulations, hidden_states)
        timestep = checked_timestep(timestep, len(hidden_states), self.config.num_train_timesteps)
        class_labels = self._checked_labels(class_labels, hidden_states)
        order, chosen = self._select_experts(timestep, hidden_states, expert)
        timestep = to_device(timestep, hidden_states.device)
        if order is None:
            sample = self._run(hidden_states, timestep, class_labels, force_drop_ids, modulations, chosen)
        else:
            order = to_device(order, hidden_states.device)
            drop_ids = None if force_drop_ids is None else force_drop_ids[order]
            is_shared = modulations is None or modulations.shape[2] == 1
            known = modulations if is_shared else modulations[:, :, order]  # type: ignore[index]
            inputs = hidden_states[order], timestep[order], class_labels[order], drop_ids, known, chosen
            # the groups of another batch would need another graph
            has_compiled_blocks = any(map(is_compiled_in_place, self.transformer_blocks))
            with torch.compiler.set_stance("force_eager") if has_compiled_blocks else nullcontext():
                sample = self._denoise(*inputs)[order.argsort()]
        output = RemixDiTModelOutput(sample=sample, prior_loss=self.prior_loss() if self.training else None)
        return output if return_dict else output.to_tuple()

    def block_inputs(self, timestep: torch.Tensor, dtype: torch.dtype, *chosen: Any) -> tuple:
        """See [`DiTModel.block_inputs`]; the inputs are those of [`RemixBlock`], which the experts decide."""
        return chosen

    def _select_experts(
        self, timestep: torch.Tensor, hidden_states: torch.Tensor, expert: int | None
    ) -> tuple[torch.Tensor | None, tuple]:
        """
        Decide which experts work on a batch.

        Returns:
            An order (B,) in which the samples of one expert are neighbours, or None for the order they have; and the blocks'
            inputs (see [`RemixBlock`]).
        """
        compiling = torch.compiler.is_compiling()
        batch_size, device = len(hidden_states), hidden_states.device
        experts = self.intervals.index(timestep)  # (B,), or (1,) for a batch that shares its timestep
        if expert is not None:
            self._check_expert(expert)
            if experts.is_cpu and not compiling and (experts != expert).any():
                raise ValueError(f"Expected `timestep` to belong to `expert` {expert}, but got {timestep.tolist()}.")
        elif compiling:  # the timesteps' values are not known: a group for each of them
            group_sizes = None if len(experts) == 1 else [1] * batch_size
            return None, (self.mixing_coefficients[to_device(experts, device)], group_sizes)
        elif len(experts) == 1:
            expert = int(experts)
        else:
            order, present, group_sizes = group_by_expert(experts)
            if len(present) > 1:
                coefficients = self.mixing_coefficients[to_device(torch.tensor(present), device)]
                return order, (coefficients, group_sizes)
            (expert,) = present

        if torch.is_grad_enabled() or compiling or not self.fuse_expert(expert):
            return None, (self.mixing_coefficients[expert : expert + 1],)
        return None, ()

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"Expected `expert` to be in [0, {self.config.num_experts}), but got {expert}.")


def _make_intervals(
    num_experts: int, num_train_timesteps: int, interval_edges: "list[float] | None"
) -> NoiseIntervals:
    if interval_edges is None:
        return NoiseIntervals.uniform(num_experts, num_train_timesteps, last_takes_rest=True)
    intervals = NoiseIntervals(tuple(interval_edges))
    if (intervals.num_experts, intervals.num_train_timesteps) != (num_experts, num_train_timesteps):
        raise ValueError(
            f"Expected `interval_edges` to divide the {num_train_timesteps} training timesteps among {num_experts} "
            f"experts, but got {interval_edges}."
        )
    return intervals
