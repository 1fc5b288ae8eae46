"""The layers of Remix-DiT: linear layers whose weights are mixtures of several sets of weights, the bases.
https://arxiv.org/abs/2412.05628

Legend: B batch, N tokens, D width, K bases, G mixtures at work.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .dit.layers import DiTBlock


class Mix(torch.autograd.Function):
    """
    Mix linear layers by matrix products, so that neither forward nor backward make scaled copies of the bases.

    Args of `apply`:
        coefficients (`torch.Tensor` of shape (G, K)): On the bases' device.
        weight (`torch.Tensor` of shape (K, out, in)): The weights of the bases.
        bias (`torch.Tensor` of shape (K, out)): The biases of the bases.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The mixtures' weights (G, out, in) and biases (G, out), in the bases' dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, coefficients: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        ctx.save_for_backward(coefficients, weight, bias)
        return mix(weight, coefficients), mix(bias, coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: torch.Tensor, grad_bias: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients (G, out, in) and (G, out) of the mixtures → those of coefficients, weight and bias, where needed."""
        coefficients, weight, bias = ctx.saved_tensors
        needs_coefficients, *needs_bases = ctx.needs_input_grad
        a = coefficients.to(weight.dtype)
        grads = [grad_weight.flatten(1), grad_bias]  # (G, out·in), (G, out)

        grad_coefficients = None
        if needs_coefficients:
            # ∂L/∂a_gk = ⟨∂L/∂W_g, W_k⟩
            from_weight, from_bias = (_matmul(grad, basis.flatten(1).T) for grad, basis in zip(grads, (weight, bias)))
            grad_coefficients = (from_weight + from_bias).to(coefficients.dtype)

        # ∂L/∂W_k = Σ_g a_gk·∂L/∂W_g; for one mixture by an outer product, in half the time of a matrix product
        product = torch.mul if len(a) == 1 else _matmul
        grad_bases = [
            product(a.T, grad).view(basis.shape) if needed else None
            for grad, basis, needed in zip(grads, (weight, bias), needs_bases)
        ]
        return grad_coefficients, *grad_bases


def mix(bases: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """
    Mix tensors.

    Args:
        bases (`torch.Tensor` of shape (K, …)): The tensors.
        coefficients (`torch.Tensor` of shape (G, K)): The weight of every tensor in every mixture.

    Returns:
        `torch.Tensor` of shape (G, …): The mixtures in the bases' dtype.
    """
    # W_g = Σ_k a_gk·W_k
    return _matmul(coefficients.to(bases.dtype), bases.flatten(1)).unflatten(1, bases.shape[1:])


def weighted_sum(bases: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """
    Mix tensors as [`mix`] does, in the operations that a compiler fuses with what follows.

    Under autocast one kernel then reads each basis once and writes the mixture in half precision, and one more makes both
    gradients of a gradient in half precision. Without a compiler this would make scaled copies of the bases.

    Args:
        bases (`torch.Tensor` of shape (K, …)): The tensors.
        coefficients (`torch.Tensor` of shape (1, K)): The weight of every tensor.

    Returns:
        `torch.Tensor` of shape (1, …): The mixture in the bases' dtype.
    """
    # W = Σ_k a_k·W_k
    a = coefficients.to(bases.dtype).view(-1, *[1] * (bases.ndim - 1))
    return (a * bases).sum(0, keepdim=True, dtype=bases.dtype)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply matrices in their own dtype: with `out`, autocast does not copy all bases to half precision."""
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]) if out is None else out)


def grouped_linear(
    hidden_states: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, group_sizes: list[int]
) -> torch.Tensor:
    """
    Apply G linear layers, each to its own group of neighbouring samples.

    Args:
        hidden_states (`torch.Tensor` of shape (B, N, in)): The tokens.
        weights (`torch.Tensor` of shape (G, out, in)): The layers' weights.
        biases (`torch.Tensor` of shape (G, out)): The layers' biases.
        group_sizes (`list[int]` of length G): The number of samples of each layer; their sum is B.

    Returns:
        `torch.Tensor` of shape (B, N, out).
    """
    groups = list(zip(hidden_states.split(group_sizes), weights.unbind(), biases.unbind()))
    # `out` works neither with gradients nor with autocast
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return torch.cat([F.linear(group, weight, bias) for group, weight, bias in groups])
    # written in place: `cat` would copy all of it once more
    output = hidden_states.new_empty(*hidden_states.shape[:2], weights.shape[1])
    for (group, weight, bias), part in zip(groups, output.split(group_sizes)):
        torch.addmm(bias, group.flatten(0, 1), weight.T, out=part.flatten(0, 1))
    return output


def _differ(fused: torch.Tensor, bases: torch.Tensor) -> bool:
    """Whether a mixture does not fit into the memory of one that was fused from other bases."""
    return (fused.shape, fused.dtype, fused.device) != (bases.shape[1:], bases.dtype, bases.device)


class BasisLinear(nn.Module):
    """
    A linear layer whose weights are a mixture of K sets of weights, the bases.

    It can be called after [`~BasisLinear.fuse`], or within [`~BasisLinear.mixing`]. The weights are uninitialised until
    [`~BasisLinear.reset_parameters`].

    Args:
        num_bases (`int`): K.
        in_features (`int`), out_features (`int`): As in `nn.Linear`.
    """

    has_bases = True

    def __init__(self, num_bases: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_bases, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_bases, out_features))
        self._mixing: tuple[torch.Tensor, list[int] | None] | None = None
        self._fused: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset_parameters(self) -> None:
        """Initialise every basis as the linear layers of a DiT."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        nn.init.zeros_(self.bias)

    def mix(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mix the bases.

        Args:
            coefficients (`torch.Tensor` of shape (G, K)): The weight of every basis in every mixture.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Weights (G, out, in) and biases (G, out).
        """
        coefficients = coefficients.to(self.weight.device)
        if torch.compiler.is_compiling() and len(coefficients) == 1:
            return weighted_sum(self.weight, coefficients), weighted_sum(self.bias, coefficients)
        return Mix.apply(coefficients, self.weight, self.bias)

    @torch.no_grad()
    def fuse(self, coefficients: torch.Tensor) -> None:
        """
        Compute one mixture and use it in every call until [`~BasisLinear.unfuse`].

        A mixture that is fused already is overwritten in place: a CUDA graph reads its inputs at the addresses that they had when it
        was captured, and there are never two copies in memory.

        `train()`, `eval()`, `to()`, `load_state_dict` and [`~BasisLinear.mixing`] unfuse as well, since they may change the
        bases. After other changes of the bases the caller has to fuse again.

        Args:
            coefficients (`torch.Tensor` of shape (1, K)): The weight of every basis.
        """
        bases = self.weight, self.bias
        if self._fused is None or any(map(_differ, self._fused, bases)):
            self.unfuse()  # first, to free its memory
            # of a tensor that is made in inference mode, nothing could be overwritten outside of it
            with torch.inference_mode(False):
                self._fused = self.weight.new_empty(self.weight.shape[1:]), self.bias.new_empty(self.bias.shape[1:])
        for fused, tensors in zip(self._fused, bases):
            a = coefficients.to(tensors)
            _matmul(a, tensors.flatten(1), out=fused.view(1, -1))

    def unfuse(self) -> None:
        """Drop the fused weights."""
        self._fused = None

    @property
    def is_fused(self) -> bool:
        """Whether there are fused weights."""
        return self._fused is not None

    @contextmanager
    def mixing(self, coefficients: torch.Tensor, group_sizes: list[int] | None = None) -> Iterator[None]:
        """
        Mix in every call, with gradients, while the context lasts.

        Args:
            coefficients (`torch.Tensor` of shape (G, K)): The weight of every basis in every mixture.
            group_sizes (`list[int]` of length G, *optional*): The number of neighbouring samples that each mixture is applied
                to. If None, there is one mixture for all samples.
        """
        self.unfuse()  # fused weights take memory, and are out of date after a training step
        self._mixing = coefficients, group_sizes
        try:
            yield
        finally:
            self._mixing = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, in) → (B, N, out)."""
        if self._mixing is None:
            if self._fused is None:
                raise RuntimeError(
                    "Expected a BasisLinear to be fused, or to be called within `mixing`, but got neither."
                )
            return F.linear(hidden_states, *self._fused)
        coefficients, group_sizes = self._mixing
        weights, biases = self.mix(coefficients)
        if group_sizes is None:
            return F.linear(hidden_states, weights.squeeze(0), biases.squeeze(0))
        return grouped_linear(hidden_states, weights, biases, group_sizes)

    def train(self, mode: bool = True) -> "BasisLinear":
        """Unfuse: averaged weights are usually swapped in through `.data`, which PyTorch does not count, before `eval()`."""
        self.unfuse()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "BasisLinear":
        self.unfuse()  # the bases move to another device or dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unfuse()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fused": None}  # copies and pickles are not fused

    def extra_repr(self) -> str:
        """See `nn.Module.extra_repr`."""
        num_bases, out_features, in_features = self.weight.shape
        return f"num_bases={num_bases}, in_features={in_features}, out_features={out_features}"


class RemixBlock(DiTBlock):
    """
    A DiT block with K sets of weights for its four linear layers; all other parts are shared.

    Args:
        sizes: The arguments of [`DiTBlock`].
        num_bases (`int`): K.
    """

    def __init__(self, *sizes: Any, num_bases: int):
        super().__init__(*sizes)
        dim = self.norm1.linear.in_features
        self.attn.to_qkv = BasisLinear(num_bases, dim, 3 * dim)
        self.attn.to_out = BasisLinear(num_bases, dim, dim)
        self.ff.net[0].proj = BasisLinear(num_bases, dim, 4 * dim)
        self.ff.net[2] = BasisLinear(num_bases, 4 * dim, dim)
        # a tuple, as a module list would register the layers a second time
        self.basis_linears = (self.attn.to_qkv, self.attn.to_out, self.ff.net[0].proj, self.ff.net[2])

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        coefficients: torch.Tensor | None = None,
        group_sizes: list[int] | None = None,
        *,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Apply the block with mixed weights.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D)): The tokens.
            conditioning (`torch.Tensor` of shape (B, D)): The sum of timestep and label embeddings.
            coefficients (`torch.Tensor` of shape (G, K), *optional*): See [`BasisLinear.mixing`]. If None, the layers use
                their fused weights.
            group_sizes (`list[int]` of length G, *optional*): See [`BasisLinear.mixing`].
            modulation (`torch.Tensor` of shape (6, B, 1, D), *optional*): See [`DiTBlock.forward`].

        Returns:
            `torch.Tensor` of shape (B, N, D).
        """
        with ExitStack() as stack:
            if coefficients is not None:
                for linear in self.basis_linears:
                    stack.enter_context(linear.mixing(coefficients, group_sizes))
            return super().forward(hidden_states, conditioning, modulation=modulation)
