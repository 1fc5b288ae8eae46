"""Conditions of a denoiser: from the columns of a batch to the arguments that the denoiser is called with."""

from typing import Any, Protocol

import torch


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


def no_conditions(batch: dict[str, torch.Tensor], dropout: torch.Tensor | None = None) -> dict[str, Any]:
    """No arguments, for a model that sees nothing but the noisy samples; see [`Conditions`]."""
    return {}
