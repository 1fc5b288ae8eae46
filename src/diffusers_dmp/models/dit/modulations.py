"""The modulations of all blocks of a DiT, computed at once and checked where they come back.
https://arxiv.org/abs/2212.09748

Legend: S timesteps, B batch, L blocks, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .layers import DiTBlock


def modulations_of(blocks: Sequence[DiTBlock], conditioning: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """
    Compute the modulations of all blocks.

    Args:
        blocks (`Sequence[DiTBlock]` of length L): The blocks.
        conditioning (`torch.Tensor` of shape (S·B, D)): c of all timesteps and labels, the labels of a timestep side by side.
        sizes (`tuple[int, int]`): S and B.

    Returns:
        `torch.Tensor` of shape (S, L, 6, B, 1, D); see [`DiTBlock.modulation`].
    """
    count, batch_size = sizes
    modulations: Any = None
    for index, block in enumerate(blocks):
        parts = torch.stack(block.modulation(conditioning)).unflatten(1, sizes)  # (6, S, B, 1, D)
        if modulations is None:  # filled in place, as to stack all blocks would take the memory twice
            modulations = parts.new_empty((count, len(blocks), 6, batch_size, 1, parts.shape[-1]))
        modulations[:, index] = parts.movedim(0, 1)
    return modulations


def check_modulations(modulations: torch.Tensor | None, num_blocks: int, batch_size: int, dim: int) -> None:
    """
    Check the modulations that a model is called with.

    Args:
        modulations (`torch.Tensor` of shape (L, 6, B or 1, 1, D), *optional*): Those of one timestep, if they are known.
        num_blocks (`int`): L.
        batch_size (`int`): B.
        dim (`int`): D.

    Raises:
        ValueError: if they have another shape, or are given where gradients are enabled.
    """
    if modulations is None:
        return
    if torch.is_grad_enabled():
        raise ValueError(
            "Expected `modulations` only under `torch.no_grad()`, because the weights that they were made with would get no "
            "gradients, but got some with gradients enabled."
        )
    expected = [(num_blocks, 6, size, 1, dim) for size in (batch_size, 1)]
    if tuple(modulations.shape) not in expected:
        raise ValueError(
            f"Expected `modulations` to be those of one timestep, of the shape {expected[0]} or, where the batch shares its label, "
            f"{expected[1]}, but got the shape {tuple(modulations.shape)}; `modulations_at(timesteps, class_labels)[i]` has it."
        )
