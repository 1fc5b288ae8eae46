"""Linear layers that are mixtures: the part of Remix-DiT that a plain DiT has not.
https://arxiv.org/abs/2412.05628

Legend: B batch, N tokens, D width, K bases, G mixtures at work.
"""

from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .dit.layers import DiTBlock


class Mix(torch.autograd.Function):
    """
    Mixtures of linear layers as matrix products, which neither forward nor backward make scaled copies of the bases.

    Args of `apply`:
        coefficients (`torch.Tensor` of shape (G, K)): On the bases' device.
        weight (`torch.Tensor` of shape (K, out, in)), bias (`torch.Tensor` of shape (K, out)): The bases.

    Returns:
        The mixtures' weights (G, out, in) and biases (G, out), in the bases' dtype.
    """

    @staticmethod
    def forward(
        ctx, coefficients: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(coefficients, weight, bias)
        return mix(weight, coefficients), mix(bias, coefficients)

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad_weight: torch.Tensor, grad_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        coefficients, weight, bias = ctx.saved_tensors
        needs_coefficients, *needs_bases = ctx.needs_input_grad
        a = coefficients.to(weight.dtype)
        grads = [grad_weight.flatten(1), grad_bias]  # (G, out·in), (G, out)

        grad_coefficients = None
        if needs_coefficients:
            # ∂L/∂a_gk = ⟨∂L/∂W_g, W_k⟩
            products = [_matmul(grad, basis.flatten(1).T) for grad, basis in zip(grads, (weight, bias))]
            grad_coefficients = sum(products).to(coefficients.dtype)

        # ∂L/∂W_k = Σ_g a_gk·∂L/∂W_g; of one mixture as an outer product, which takes half a matrix product's time
        product = torch.mul if len(a) == 1 else _matmul
        grad_bases = [
            product(a.T, grad).view(basis.shape) if needed else None
            for grad, basis, needed in zip(grads, (weight, bias), needs_bases)
        ]
        return grad_coefficients, *grad_bases


def mix(bases: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Bases (K, …) and coefficients (G, K) → mixtures (G, …) in the bases' dtype."""
    # W_g = Σ_k a_gk·W_k
    return _matmul(coefficients.to(bases.dtype), bases.flatten(1)).unflatten(1, bases.shape[1:])


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """With an `out`, autocast leaves a product alone; it would copy all bases into half precision."""
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))


def grouped_linear(
    hidden_states: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, group_sizes: list[int]
) -> torch.Tensor:
    """
    Every group of neighbouring samples through a linear layer of its own.

    Args:
        hidden_states (`torch.Tensor` of shape (B, N, in)).
        weights (`torch.Tensor` of shape (G, out, in)), biases (`torch.Tensor` of shape (G, out)).
        group_sizes (`list[int]` of length G): With the sum B.

    Returns:
        `torch.Tensor` of shape (B, N, out).
    """
    groups = list(zip(hidden_states.split(group_sizes), weights.unbind(), biases.unbind()))
    # an `out` knows neither gradients nor autocast
    if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
        return torch.cat([F.linear(group, weight, bias) for group, weight, bias in groups])
    # written where it belongs: `cat` would be one more pass over all of it
    output = hidden_states.new_empty(*hidden_states.shape[:2], weights.shape[1])
    for (group, weight, bias), part in zip(groups, output.split(group_sizes)):
        torch.addmm(bias, group.flatten(0, 1), weight.T, out=part.flatten(0, 1))
    return output


class BasisLinear(nn.Module):
    """
    K linear layers that act as mixtures of them: as the one that they [`hold`], or, for a while, as those of [`mixing`].
    [`reset_parameters`] initialises them.

    Args:
        num_bases (`int`): K.
        in_features (`int`), out_features (`int`): As in `nn.Linear`.
    """

    has_bases = True

    def __init__(self, num_bases: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_bases, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_bases, out_features))
        self._mixing = None
        self.release()

    def reset_parameters(self) -> None:
        """Each basis as DiT's linear layers start."""
        for basis in self.weight:
            nn.init.xavier_uniform_(basis)
        nn.init.zeros_(self.bias)

    def mix(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (G, K) → weights (G, out, in) and biases (G, out)."""
        return Mix.apply(coefficients.to(self.weight.device), self.weight, self.bias)

    def hold(self, coefficients: torch.Tensor) -> None:
        """Act as this mixture, of coefficients (1, K), until [`release`]."""
        self.release()  # first, so that there are never two
        self._held = tuple(part.squeeze(0) for part in self.mix(coefficients))

    def release(self) -> None:
        """Forget the mixture that is held."""
        self._held = None

    @property
    def holds(self) -> bool:
        """Whether a mixture is held."""
        return self._held is not None

    @contextmanager
    def mixing(self, coefficients: torch.Tensor, group_sizes: list[int]):
        """
        Act as these mixtures while the context lasts, made anew at every call and with gradients.

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
        return grouped_linear(hidden_states, weights, biases, group_sizes)

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

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_held": None}  # neither copies nor pickles hold a mixture

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
        # a tuple, which is no submodule of its own
        self.basis_linears = (self.attn.to_qkv, self.attn.to_out, self.ff.net[0].proj, self.ff.net[2])

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
