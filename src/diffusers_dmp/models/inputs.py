"""Timesteps and labels as a model takes them.

Legend: B batch.
"""

from collections.abc import Mapping
from typing import Any

import torch

CLASS_COUNTS = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")  # what configurations call it


def class_count(config: Mapping[str, Any]) -> int | None:
    """How many classes a denoiser of this configuration knows, without a null class; None for one that takes no labels."""
    return next((config[name] for name in CLASS_COUNTS if config.get(name) is not None), None)


def checked_labels(
    class_labels: torch.LongTensor | None, num_classes: int, num_rows: int, sample: torch.Tensor
) -> torch.LongTensor:
    """
    Labels (B,) on the sample's device: the null class, or the only one, where none are given.

    Args:
        num_classes (`int`): Without the null class.
        num_rows (`int`): Of the table of labels, one more with a null class.
        sample (`torch.Tensor` of shape (B, …)): What they are the labels of.

    Raises:
        ValueError: if a label is out of range (on the CPU), or missing for a model without a null class.
    """
    if class_labels is None:
        if num_rows == num_classes > 1:
            raise ValueError(
                f"Expected `class_labels` for a model of {num_rows} classes and no null class, but got None."
            )
        # the last row is the null class, or the only one
        return torch.full((len(sample),), num_rows - 1, device=sample.device)
    readable = class_labels.is_cpu and not torch.compiler.is_compiling()  # elsewhere a look would stall the device
    if readable and (class_labels.min() < 0 or class_labels.max() >= num_rows):
        raise ValueError(f"Expected `class_labels` to be in [0, {num_rows}), but got {class_labels.tolist()}.")
    return class_labels.to(sample.device, non_blocking=True)


def shared_or_per_sample(timestep: torch.Tensor) -> torch.Tensor:
    """
    One timestep (1,) for a batch that shares it, else (B,). Whether it is shared is read from the tensor's shape and
    strides (`t.expand(B)` has stride 0), never from its values, which would stall an accelerator.
    """
    if timestep.ndim == 0:
        return timestep[None]
    return timestep[:1] if timestep.stride(0) == 0 else timestep


def drop_labels(
    class_labels: torch.LongTensor, null_class: int, drop_prob: float, force_drop_ids: torch.BoolTensor | None
) -> torch.LongTensor:
    """Labels (B,), the null class where `force_drop_ids` says so, or, without it, at random."""
    if force_drop_ids is None and drop_prob > 0:
        force_drop_ids = torch.rand(class_labels.shape, device=class_labels.device) < drop_prob
    return class_labels if force_drop_ids is None else class_labels.masked_fill(force_drop_ids, null_class)
