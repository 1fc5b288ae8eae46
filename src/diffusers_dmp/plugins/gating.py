"""Noisy top-k gating: how much of each prompt each block gets.
https://arxiv.org/abs/1701.06538

Legend: L blocks that get prompts, B batch, M prompts.
"""

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput

CV_EPS = 1e-10


@dataclass
class PromptGates(BaseOutput):
    """
    The gates of all blocks, and the losses that keep all prompts in use.

    Args:
        gates (`torch.Tensor` of shape (L, B, M)): The weight of each prompt in each block, for each sample. The weights of
            a sample in a block sum to 1.
        importance_loss (`torch.Tensor` of shape (), *optional*): In training mode, how unevenly the prompts are weighted.
        load_loss (`torch.Tensor` of shape (), *optional*): In training mode with k < M, how unevenly the prompts are
            selected.
    """

    gates: torch.Tensor
    importance_loss: torch.Tensor | None = None
    load_loss: torch.Tensor | None = None


def top_k_gates(logits: torch.Tensor, k: int) -> PromptGates:
    """
    Gates for inference: the softmax of the k largest logits, and zero for the others.

    Args:
        logits (`torch.Tensor` of shape (L, B, M)): The scores of the prompts.
        k (`int`): How many prompts are selected, in [1, M].

    Returns:
        [`PromptGates`] without losses.
    """
    return PromptGates(gates=_softmax_of_top_k(logits, k))


def noisy_top_k_gates(logits: torch.Tensor, noise_std: torch.Tensor, k: int) -> PromptGates:
    """
    Gates for training: those of noisy logits, with the losses that balance the prompts.

    Args:
        logits (`torch.Tensor` of shape (L, B, M)): The scores of the prompts.
        noise_std (`torch.Tensor` of shape (B, M)): The standard deviation of the noise.
        k (`int`): How many prompts are selected, in [1, M].

    Returns:
        [`PromptGates`] with `importance_loss`, and for k < M with `load_loss`.
    """
    # H = logits + ε·std  (equation 4)
    noisy_logits = logits + torch.randn_like(logits) * noise_std
    gates = _softmax_of_top_k(noisy_logits, k)
    # importance = CV²(Σ_l g_l)
    importance_loss = _squared_coefficient_of_variation(gates.sum(0))
    load_loss = None
    if k < logits.shape[-1]:
        # P(m in top k) = Φ((logits - the k-th largest of the other prompts' noisy logits) / std)  (equation 9)
        kth, next_largest = noisy_logits.topk(k + 1).values[..., -2:].split(1, dim=-1)  # (L, B, 1) each
        threshold = torch.where(noisy_logits > next_largest, next_largest, kth)
        load = torch.special.ndtr((logits - threshold) / noise_std).sum((0, 1))  # (M,)
        # Deviation from reference: CV², as the term is defined (equation 11), where the published code adds the sum
        load_loss = _squared_coefficient_of_variation(load)
    return PromptGates(gates=gates, importance_loss=importance_loss, load_loss=load_loss)


def _softmax_of_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    if k == logits.shape[-1]:
        return logits.softmax(-1)
    largest, prompts = logits.topk(k)
    return torch.zeros_like(logits).scatter(-1, prompts, largest.softmax(-1))


def _squared_coefficient_of_variation(values: torch.Tensor) -> torch.Tensor:
    # CV² = Var / mean²
    return values.var() / (values.mean().square() + CV_EPS)
