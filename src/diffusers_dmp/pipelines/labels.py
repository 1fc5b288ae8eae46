"""Class labels as a pipeline's user gives them: indices, names, or none.

Legend: B batch.
"""

from typing import Any

import torch

from ..models.class_names import find_class, label_list


def prepare_labels(
    class_labels: Any,
    batch_size: int | None,
    *,
    num_classes: int | None,
    has_null_class: bool,
    id2label: dict[str, str] | None,
) -> torch.Tensor | None:
    """
    Check class labels and turn them into indices.

    Args:
        class_labels (`int`, `str`, or a list, array or tensor of shape (B,) of either): The labels; a single one, which is no
            list, is for the whole batch. If None, the null class, or the only class of a model without a null class.
        batch_size (`int`, *optional*): B. By default the number of labels.
        num_classes (`int`, *optional*): The classes of the model without its null class; None if it takes no labels.
        has_null_class (`bool`): Whether the index `num_classes` stands for no class.
        id2label (`dict[str, str]`, *optional*): Names by index.

    Returns:
        `torch.LongTensor` of shape (B,) on the CPU, or None for a model that takes no labels.

    Raises:
        ValueError: if a label is unknown or out of range, labels are missing, or given to a model without classes, or there
            are not B of them.
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
        return torch.full((batch_size or 1,), num_classes if has_null_class else 0)
    labels = [find_class(label, id2label) if isinstance(label, str) else label for label in label_list(class_labels)]
    last = num_classes if has_null_class else num_classes - 1
    if min(labels) < 0 or max(labels) > last:
        raise ValueError(
            f"Expected `class_labels` to be in [0, {last}], but got {labels}."
            + (f" The index {last} is the null class: no class." if has_null_class else "")
        )
    if batch_size is not None and len(labels) != batch_size:
        if not is_for_all(class_labels):
            raise ValueError(
                f"Expected `class_labels` to be one label, or a list of the {batch_size} of `batch_size`, "
                f"but got a list of {len(labels)}."
            )
        labels *= batch_size
    return torch.tensor(labels)


def is_for_all(class_labels: Any) -> bool:
    """Tell whether labels are for a batch of any size: none, or one that is no list, and no array or tensor with an axis."""
    return class_labels is None or isinstance(class_labels, (str, int)) or getattr(class_labels, "ndim", None) == 0
