"""Class labels as a pipeline's user gives them: indices, names, or none.

Legend: B batch.
"""

from typing import Any

import numpy as np
import torch


def label_ids(labels: str | list[str], id2label: dict[str, str] | None) -> list[int]:
    """
    Look class names up.

    Args:
        labels (`str` or `list[str]`): The names.
        id2label (`dict[str, str]`, *optional*): Names by index; a name may list synonyms, separated by commas.

    Returns:
        `list[int]`: the indices.

    Raises:
        ValueError: if a name is unknown; the message lists the known ones.
    """
    label2id = {name.strip(): int(index) for index, names in (id2label or {}).items() for name in names.split(",")}
    labels = [labels] if isinstance(labels, str) else labels
    for label in labels:
        if label not in label2id:
            raise ValueError(f"Expected `class_labels` to be among {list(label2id)}, but got {label!r}.")
    return [label2id[label] for label in labels]


def prepare_labels(
    class_labels: Any,
    batch_size: int,
    *,
    num_classes: int | None,
    has_null_class: bool,
    id2label: dict[str, str] | None,
) -> torch.Tensor | None:
    """
    Check class labels and turn them into indices.

    Args:
        class_labels (`int`, `str`, a list or array of either, or `torch.LongTensor`): The labels. If None, the null
            class, or the only class of a model without a null class.
        batch_size (`int`): How many labels to make if `class_labels` is None.
        num_classes (`int`, *optional*): The classes of the model without its null class; None if it takes no labels.
        has_null_class (`bool`): Whether the index `num_classes` stands for no class.
        id2label (`dict[str, str]`, *optional*): Names by index.

    Returns:
        `torch.LongTensor` of shape (B,) on the CPU, or None for a model that takes no labels.

    Raises:
        ValueError: if a label is unknown or out of range, or labels are missing, or given to a model without classes.
    """
    if num_classes is None:
        if class_labels is not None:
            raise ValueError(f"Expected no `class_labels` for a model without classes, but got {class_labels}.")
        return None
    if class_labels is None:
        if not has_null_class and num_classes > 1:
            raise ValueError(
                f"Expected `class_labels` for a model of {num_classes} classes and no null class, but got None."
            )
        return torch.full((batch_size,), num_classes if has_null_class else 0)
    labels = _as_tensor(class_labels, id2label)
    if labels.is_floating_point():
        raise ValueError(f"Expected `class_labels` to be integers or names, but got {labels.tolist()}.")
    labels = labels.long().cpu().reshape(-1)
    last = num_classes if has_null_class else num_classes - 1
    if len(labels) == 0 or labels.min() < 0 or labels.max() > last:
        raise ValueError(f"Expected `class_labels` to be in [0, {last}], but got {labels.tolist()}.")
    return labels


def _as_tensor(class_labels: Any, id2label: dict[str, str] | None) -> torch.Tensor:
    if isinstance(class_labels, torch.Tensor):
        return class_labels
    labels = list(class_labels) if isinstance(class_labels, (list, tuple, np.ndarray)) else [class_labels]
    if any(isinstance(label, str) for label in labels):
        labels = label_ids(labels, id2label)
    return torch.as_tensor(np.asarray(labels, dtype=None if labels else np.int64))
