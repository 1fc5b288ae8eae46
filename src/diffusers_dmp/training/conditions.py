"""Conditions of a denoiser: from the columns of a batch to the arguments that the denoiser is called with."""

from typing import Any, Protocol

import torch
from torch import nn

LATENT_COLUMNS = ("mean", "std")  # of the latents' distribution, see [`clean_samples`]


class Conditions(Protocol):
    """How a batch becomes the conditions of a denoiser."""

    def __call__(self, batch: dict[str, torch.Tensor], dropout: torch.Tensor | None = None) -> dict[str, Any]:
        """
        The keyword arguments of the denoiser.

        Args:
            batch (`dict[str, torch.Tensor]`): The columns of a batch of B samples.
            dropout (`torch.Tensor` of shape (B,), *optional*): One uniform random number in [0, 1) for each sample: its
                condition is dropped where the number is below the probability of that. No condition is dropped without it.
        """


class LabelConditions:
    """
    Class labels as conditions; unconditional for data without labels.

    Args:
        dropout_prob (`float`): How often training drops a label, for classifier-free guidance.
    """

    def __init__(self, dropout_prob: float):
        self.dropout_prob = dropout_prob

    def __call__(self, batch: dict[str, torch.Tensor], dropout: torch.Tensor | None = None) -> dict[str, Any]:
        """`class_labels` (B,), or None, and which of them to drop; see [`Conditions`]."""
        conditions = {"class_labels": batch.get("class_labels")}
        if dropout is not None:
            conditions["force_drop_ids"] = dropout < self.dropout_prob
        return conditions


class TextConditions:
    """
    Encoded prompts as conditions.

    Args:
        empty (`dict[str, torch.Tensor]`): The columns of the empty prompt, each of shape (1, …), on the device of the training.
        dropout_prob (`float`): How often training takes them instead of a sample's own, for classifier-free guidance.
    """

    def __init__(self, empty: dict[str, torch.Tensor], dropout_prob: float = 0.0):
        self.empty = empty
        self.dropout_prob = dropout_prob

    def __call__(self, batch: dict[str, torch.Tensor], dropout: torch.Tensor | None = None) -> dict[str, Any]:
        """All columns but those of the latents, (B, …), in float32 if they are floats; see [`Conditions`]."""
        columns = {
            name: column.float() if column.is_floating_point() else column  # shards may have stored half of the bits
            for name, column in batch.items()
            if name not in LATENT_COLUMNS
        }
        if dropout is None or not self.dropout_prob:
            return columns
        is_dropped = dropout < self.dropout_prob
        return columns | {
            name: _replaced(columns[name], empty, is_dropped) for name, empty in self.empty.items() if name in columns
        }


def _replaced(column: torch.Tensor, empty: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
    """A column (B, …) with `empty` (1, …) in the place of the dropped samples; the shorter text is padded with zeros."""
    empty = empty.to(column.dtype)
    if column.ndim > 1 and column.shape[1] != empty.shape[1]:
        column, empty = (_padded(each, max(column.shape[1], empty.shape[1])) for each in (column, empty))
    return torch.where(is_dropped.view(-1, *[1] * (column.ndim - 1)), empty, column)


def _padded(column: torch.Tensor, length: int) -> torch.Tensor:
    """A column (B, L, …) with zeros up to the length along its second dimension."""
    return nn.functional.pad(column, (0, 0) * (column.ndim - 2) + (0, length - column.shape[1]))


def no_conditions(batch: dict[str, torch.Tensor], dropout: torch.Tensor | None = None) -> dict[str, Any]:
    """No arguments, for a model that sees nothing but the noisy samples; see [`Conditions`]."""
    return {}
