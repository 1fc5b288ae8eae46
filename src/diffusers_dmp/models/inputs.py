"""Checks of the timesteps and class labels that a model is called with.

Legend: B batch, T training timesteps.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..intervals import check_timesteps

CLASS_COUNTS = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")  # the names that model configurations use


def has_classes(num_classes: int | None) -> bool:
    """Tell whether there are classes to choose from: a DiT that was trained without labels has a single one."""
    return (num_classes or 1) > 1


def class_count(config: Mapping[str, Any]) -> int | None:
    """
    Read the number of classes, without the null class, from a denoiser's configuration.

    Args:
        config (`Mapping[str, Any]`): The configuration of any Diffusers denoiser.

    Returns:
        `int`: The number of classes; None for a denoiser that takes no labels.
    """
    return next((config[name] for name in CLASS_COUNTS if config.get(name) is not None), None)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """
    Move a tensor without waiting for an accelerator.

    Args:
        tensor (`torch.Tensor`): On any device.
        device (`torch.device`): Where it goes.

    Returns:
        `torch.Tensor`: The same values there.
    """
    # a copy to the CPU that is not waited for would be read before it has arrived
    return tensor.to(device, non_blocking=device.type != "cpu")


def checked_timestep(timestep: torch.Tensor | float | int, batch_size: int, num_train_timesteps: int) -> torch.Tensor:
    """
    Check the timesteps of a batch, and reduce them to one where the batch shares it.

    Whether it is shared is read from the tensor's shape and strides (`t.expand(B)` has stride 0), not from its values, as
    reading values would make an accelerator wait.

    Args:
        timestep (`torch.Tensor` of shape (B,), (1,) or (), `int` or `float`): In steps of the training schedule.
        batch_size (`int`): B.
        num_train_timesteps (`int`): T.

    Returns:
        `torch.Tensor` of shape (1,) for a batch that shares its timestep, else (B,), on the device it was given on.

    Raises:
        ValueError: if there are neither one nor B timesteps, or (on the CPU) one of them is out of range.
    """
    timestep = torch.as_tensor(timestep)
    check_timesteps(timestep, num_train_timesteps)
    if timestep.ndim == 0:
        return timestep[None]
    if timestep.stride(0) == 0:
        timestep = timestep[:1]
    if len(timestep) not in (1, batch_size):
        raise ValueError(f"Expected `timestep` to be one or {batch_size}, but got {len(timestep)} of them.")
    return timestep


def checked_labels(
    class_labels: torch.Tensor | None, num_classes: int, num_rows: int, sample: torch.Tensor
) -> torch.Tensor:
    """
    Check class labels and move them to the sample's device.

    Args:
        class_labels (`torch.LongTensor` of shape (B,), *optional*): The labels. If None, the null class, or the only class
            of an unconditional model.
        num_classes (`int`): The number of classes without the null class.
        num_rows (`int`): The number of rows of the label embedding: one more if there is a null class.
        sample (`torch.Tensor` of shape (B, …)): The batch.

    Returns:
        `torch.LongTensor` of shape (B,).

    Raises:
        ValueError: if a label is out of range (checked on the CPU only), there are not B of them, or labels are missing for a
            model without a null class.
    """
    if class_labels is None:
        if num_rows == num_classes > 1:
            raise ValueError(
                f"Expected `class_labels` for a model of {num_rows} classes and no null class, but got None."
            )
        # the last row is the null class, or the only class
        return torch.full((len(sample),), num_rows - 1, device=sample.device)
    if class_labels.shape != (len(sample),):
        raise ValueError(
            f"Expected `class_labels` to be one for each of {len(sample)} samples, but got the shape {tuple(class_labels.shape)}."
        )
    # reading values on an accelerator would make the CPU wait for it
    readable = class_labels.is_cpu and not torch.compiler.is_compiling()
    if readable and (class_labels.min() < 0 or class_labels.max() >= num_rows):
        null_class = f" The index {num_classes} is the null class: no class." if num_rows > num_classes else ""
        raise ValueError(
            f"Expected `class_labels` to be in [0, {num_rows}), but got {class_labels.tolist()}.{null_class}"
        )
    return to_device(class_labels, sample.device)


def drop_labels(
    class_labels: torch.Tensor, null_class: int, drop_prob: float, force_drop_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Replace some labels by the null class, for classifier-free guidance (https://arxiv.org/abs/2207.12598).

    Args:
        class_labels (`torch.LongTensor` of shape (B,)): The labels.
        null_class (`int`): The label that stands for no class.
        drop_prob (`float`): The probability that a label is replaced.
        force_drop_ids (`torch.BoolTensor` of shape (B,), *optional*): Which labels to replace, instead of random ones.

    Returns:
        `torch.LongTensor` of shape (B,).
    """
    if force_drop_ids is None and drop_prob > 0:
        force_drop_ids = torch.rand(class_labels.shape, device=class_labels.device) < drop_prob
    return class_labels if force_drop_ids is None else class_labels.masked_fill(force_drop_ids, null_class)
