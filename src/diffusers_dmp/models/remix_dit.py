"""Remix-DiT: N experts, each a mixture of K sets of weights, at the cost of one DiT.
https://arxiv.org/abs/2412.05628

Legend: B batch, D width, K bases, E experts, G the experts at work in a batch.
"""

import inspect
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn
from torch.autograd.function import once_differentiable

from ..intervals import NoiseIntervals
from .dit import DIT_PRESETS, DiTModel
from .dit_layers import DiTBlock
from .loading import check_weights, in_dtype

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


class Mix(torch.autograd.Function):
    """
    Mixtures of linear layers as matrix products, which neither forward nor backward make scaled copies of the bases.

    Args of `apply`:
        coefficients (`torch.Tensor` of shape (G, K)).
        weight (`torch.Tensor` of shape (K, out, in)), bias (`torch.Tensor` of shape (K, out)): The bases.

    Returns:
        The mixtures' weights (G, out, in) and biases (G, out), in the bases' dtype.
    """

    @staticmethod
    def forward(
        ctx, coefficients: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(coefficients, weight, bias)
        return _mix(weight, coefficients), _mix(bias, coefficients)

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad_weight: torch.Tensor, grad_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        coefficients, weight, bias = ctx.saved_tensors
        a = coefficients.to(weight.dtype)
        grad_weight = grad_weight.flatten(1)
        # ∂L/∂a_gk = ⟨∂L/∂W_g, W_k⟩
        grad_coefficients = _matmul(grad_weight, weight.flatten(1).T) + _matmul(grad_bias, bias.T)
        # ∂L/∂W_k = Σ_g a_gk·∂L/∂W_g; of one mixture as an outer product, which takes half a matrix product's time
        product = torch.mul if len(a) == 1 else _matmul
        grad_bases = product(a.T, grad_weight).unflatten(1, weight.shape[1:]), product(a.T, grad_bias)
        return grad_coefficients.to(coefficients.dtype), *grad_bases


def _mix(bases: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Bases (K, …) and coefficients (G, K) → mixtures (G, …) in the bases' dtype."""
    # W_g = Σ_k a_gk·W_k
    return _matmul(coefficients.to(bases.dtype), bases.flatten(1)).unflatten(1, bases.shape[1:])


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """With an `out`, autocast leaves a product alone; it would copy all bases into half precision."""
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))


def tensor_state(tensor: torch.Tensor) -> tuple[int, int | None]:
    """Another one whenever the tensor is replaced or changed in place."""
    # PyTorch counts the changes for autograd's sake; of tensors made under `inference_mode` it does not
    return id(tensor), None if tensor.is_inference() else tensor._version


class BasisLinear(nn.Module):
    """
    K linear layers that act as mixtures of them: as the one that they [`hold`], or, for a while, as those of [`mixing`].

    Args:
        num_bases (`int`): K.
        in_features (`int`), out_features (`int`): As in `nn.Linear`.
    """

    def __init__(self, num_bases: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_bases, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_bases, out_features))
        self._mixing = None
        self.release()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each basis as DiT's linear layers start."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        nn.init.zeros_(self.bias)

    def mix(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (G, K) → weights (G, out, in) and biases (G, out)."""
        return Mix.apply(coefficients, self.weight, self.bias)

    def hold(self, coefficients: torch.Tensor, expert: tuple) -> None:
        """
        Act as this mixture until [`release`]; mixed anew only if another expert or other bases were held.

        Args:
            coefficients (`torch.Tensor` of shape (1, K)).
            expert (`tuple`): What the coefficients are recognised by.
        """
        state = (*expert, *tensor_state(self.weight), *tensor_state(self.bias))
        if self._held_state != state:
            self.release()  # first, so that there are never two
            self._held = tuple(part.squeeze(0) for part in self.mix(coefficients))
            self._held_state = state

    def release(self) -> None:
        """Forget the mixture that is held."""
        self._held = self._held_state = None

    @contextmanager
    def mixing(self, coefficients: torch.Tensor, group_sizes: list[int]):
        """
        Args:
            coefficients (`torch.Tensor` of shape (G, K)): The mixtures to act as.
            group_sizes (`list[int]` of length G): On how many neighbouring samples each of them acts.
        """
        self.release()  # it costs memory, and after a training step it is out of date
        self._mixing = coefficients, group_sizes
        try:
            yield
        finally:
            self._mixing = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, in) → (B, N, out)."""
        if self._mixing is None:
            return F.linear(hidden_states, *self._held)
        coefficients, group_sizes = self._mixing
        weights, biases = self.mix(coefficients)
        if len(group_sizes) == 1:
            return F.linear(hidden_states, weights.squeeze(0), biases.squeeze(0))
        groups = zip(hidden_states.split(group_sizes), weights.unbind(), biases.unbind())
        return torch.cat([F.linear(group, weight, bias) for group, weight, bias in groups])

    def train(self, mode: bool = True) -> "BasisLinear":
        # between the modes, averaged weights come and go through `.data`, where PyTorch does not count
        self.release()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> "BasisLinear":
        self.release()  # on the way to another device or dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        self.release()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        num_bases, out_features, in_features = self.weight.shape
        return f"num_bases={num_bases}, in_features={in_features}, out_features={out_features}"


class RemixBlock(DiTBlock):
    """A DiT block with K sets of weights for its four linear layers, all other parts being shared."""

    def __init__(self, dim: int, heads: int, dropout: float, norm_eps: float, num_bases: int):
        super().__init__(dim, heads, dropout, norm_eps)
        self.attn.to_qkv = BasisLinear(num_bases, dim, 3 * dim)
        self.attn.to_out = BasisLinear(num_bases, dim, dim)
        self.ff.net[0].proj = BasisLinear(num_bases, dim, 4 * dim)
        self.ff.net[2] = BasisLinear(num_bases, 4 * dim, dim)

    @property
    def basis_linears(self) -> tuple[BasisLinear, ...]:
        return self.attn.to_qkv, self.attn.to_out, self.ff.net[0].proj, self.ff.net[2]

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        coefficients: torch.Tensor | None = None,
        group_sizes: list[int] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)), conditioning (`torch.Tensor` of shape (B, D)).
            coefficients, group_sizes (*optional*): See [`BasisLinear.mixing`]; without them the layers act as what
                they hold.
        """
        with ExitStack() as stack:
            if coefficients is not None:
                for linear in self.basis_linears:
                    stack.enter_context(linear.mixing(coefficients, group_sizes))
            return super().forward(hidden_states, conditioning)


class RemixDiTModel(DiTModel):
    """
    Remix-DiT (https://arxiv.org/abs/2412.05628): the linear layers of the blocks come in K bases, and each of N
    experts, which own equal stretches of the timesteps, mixes them by N x K learned coefficients.

    Without gradients (in sampling) the mixture of the expert at work is kept until another expert is: one copy more of
    those layers. It is mixed anew after a forward pass with gradients, `train()`, `eval()`, `load_state_dict`, `to()`, and
    every in-place change that PyTorch counts. It does not count those through `parameter.data`, as Diffusers'
    `EMAModel.copy_to` makes them: call `eval()` after such.

    `compile_repeated_blocks()` compiles with the kept mixture; `torch.compile(model)` mixes at every call.

    Args:
        num_bases (`int`): K. One basis is the plain DiT.
        num_experts (`int`): N. The last one takes the rest of the timesteps where it does not divide them.

    The other arguments are those of [`DiTModel`].

    Raises:
        ValueError: as [`DiTModel`] does, and for less than one basis or expert.
    """

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
        self._basis_linears = [linear for block in self.transformer_blocks for linear in block.basis_linears]

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
    def from_diffusers(cls, stock_model_or_path, **kwargs) -> "RemixDiTModel":
        """Diffusers' own DiT in every basis; see [`~DiTModel.from_diffusers`] and [`~RemixDiTModel.from_dit`]."""
        return cls.from_dit(DiTModel.from_diffusers(stock_model_or_path, **kwargs))

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
            weights[name] = _mix(weights[name], coefficients).squeeze(0)
        model = DiTModel(**_dit_config(self))
        model.load_state_dict(weights)
        return in_dtype(model, self.dtype).to(self.device).eval()

    def basis_names(self) -> list[str]:
        """The entries of the state dict that come in K bases."""
        linears = [name for name, module in self.named_modules() if isinstance(module, BasisLinear)]
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
        for block in self.transformer_blocks:
            for linear in block.basis_linears:
                linear.reset_parameters()

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.LongTensor | None = None,
        force_drop_ids: torch.BoolTensor | None = None,
        expert: int | None = None,
        return_dict: bool = True,
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
        timestep = self._check_timestep(timestep)
        class_labels = self._check_labels(class_labels, hidden_states)
        order, block_inputs = self._experts_at_work(timestep, len(hidden_states), expert)
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
        self, timestep: torch.Tensor, batch_size: int, expert: int | None
    ) -> tuple[torch.LongTensor | None, tuple]:
        """An order (B,) in which an expert's samples are neighbours, if there are several experts; the blocks' inputs."""
        compiling = torch.compiler.is_compiling()
        experts = self.intervals.index(timestep)  # (B,), or (1,) for a batch that shares its timestep
        if expert is not None:
            self._check_expert(expert)
            if experts.is_cpu and not compiling and (experts != expert).any():
                raise ValueError(f"Expected `timestep` to belong to `expert` {expert}, but got {timestep.tolist()}.")
        elif compiling:  # the timesteps' values are not known: a group for each of them
            group_sizes = [batch_size // len(experts)] * len(experts)
            return None, (self.mixing_coefficients[experts.to(self.device)], group_sizes)
        else:
            experts, order = experts.sort(stable=True)
            experts, group_sizes = experts.unique_consecutive(return_counts=True)
            if len(experts) > 1:
                return order, (self.mixing_coefficients[experts.to(self.device)], group_sizes.tolist())
            expert = experts.item()

        if torch.is_grad_enabled() or compiling:
            return None, (self.mixing_coefficients[expert : expert + 1], [batch_size])
        self._hold_expert(expert)
        return None, ()

    def _hold_expert(self, expert: int) -> None:
        """Have the layers hold that expert's mixture, one after the other, so that there is never more than one copy."""
        coefficients = self.mixing_coefficients[expert : expert + 1]
        for linear in self._basis_linears:
            linear.hold(coefficients, (expert, *tensor_state(self.mixing_logits)))

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.config.num_experts:
            raise ValueError(f"Expected `expert` to be in [0, {self.config.num_experts}), but got {expert}.")


def _dit_config(model: DiTModel) -> dict:
    """The constructor's arguments that every DiT has."""
    return {name: model.config[name] for name in inspect.signature(DiTModel.__init__).parameters if name != "self"}
