"""Class labels: a column of class indices or names, checked as a whole before anything is trained on it."""

import re
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NO_LABELS = "none"  # the `label_column` of those who want no labels


def natural_key(name: str) -> tuple[list[str | int], str]:
    """What to sort names by, so that numbers in them are in numeric order: 2 before 10, and img2 before img10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def wants_labels(label_column: str | None) -> bool:
    """Whether a `label_column` names a column; None, "" and "none" stand for no labels."""
    return label_column not in (None, "", NO_LABELS)


def label_values(dataset: datasets.Dataset, label_column: str) -> pa.ChunkedArray:
    """The column of labels as it is stored."""
    return dataset.select_columns([label_column]).with_format("arrow")[:][label_column]


def check_labels(dataset: datasets.Dataset, label_column: str) -> datasets.Dataset:
    """
    Check every label of a data set, and turn names into class indices.

    Args:
        dataset (`datasets.Dataset`): With the column.
        label_column (`str`): Its name. Integers, and floats that are integers, are class indices. Strings are names of
            classes, which are sorted with numbers in numeric order.

    Returns:
        `datasets.Dataset`: The same, with the column as `ClassLabel` or integers.

    Raises:
        ValueError: if a label is missing, negative, no integer or no class; its row is named.
    """
    labels, feature = label_values(dataset, label_column), dataset.features[label_column]
    type_ = labels.type
    _refuse(dataset, label_column, labels, pc.is_null(labels))
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        _refuse(dataset, label_column, labels, pc.equal(labels, ""))
        names = sorted(pc.unique(labels).to_pylist(), key=natural_key)
        indices = pc.index_in(labels, value_set=pa.array(names, type_))
        return _replace(dataset, label_column, indices, datasets.ClassLabel(names=names))
    if pa.types.is_floating(type_):
        is_integer = pc.and_(pc.is_finite(labels), pc.equal(pc.floor(labels), labels))
        _refuse(dataset, label_column, labels, pc.invert(is_integer))
        _refuse(dataset, label_column, labels, pc.less(labels, 0))
        return _replace(dataset, label_column, labels.cast(pa.int64()), datasets.Value("int64"))
    if not pa.types.is_integer(type_):
        _refuse(dataset, label_column, labels, pa.array([True] * len(labels)))
    _refuse(dataset, label_column, labels, pc.less(labels, 0))
    if isinstance(feature, datasets.ClassLabel) and feature.num_classes is not None:
        _refuse(dataset, label_column, labels, pc.greater_equal(labels, feature.num_classes))
    return dataset


def class_names(dataset: datasets.Dataset, label_column: str = "label") -> list[str] | None:
    """
    The names of the classes, ordered by class index.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        label_column (`str`): The column of class labels.

    Returns:
        `list[str]`: The names; the indices themselves where the labels are plain integers; None for a data set without
        labels.

    Raises:
        ValueError: if the labels are neither classes nor integers.
    """
    if label_column not in dataset.column_names:
        return None
    feature = dataset.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    labels = label_values(dataset, label_column)
    if not pa.types.is_integer(labels.type):
        raise ValueError(
            f"Expected `label_column` {label_column!r} to hold class indices, but got {labels.type}; "
            f"`load_images(…, label_column={label_column!r})` makes indices of names."
        )
    largest = pc.max(labels).as_py()
    return [str(label) for label in range(0 if largest is None else largest + 1)]


def class_counts(dataset: datasets.Dataset, label_column: str) -> np.ndarray:
    """The number of rows of each class, by class index; as many as there are [`class_names`]."""
    names = class_names(dataset, label_column) or []
    labels = label_values(dataset, label_column).to_numpy()
    return np.bincount(labels.astype(np.int64), minlength=len(names))


def _refuse(dataset: datasets.Dataset, label_column: str, labels: pa.ChunkedArray, wrong: Any) -> None:
    """Raise an error that names the first row where `wrong` is true."""
    row = pc.index(wrong, True).as_py()
    if row < 0:
        return
    number = pc.sum(wrong).as_py()
    others = f", and {number - 1} more such rows" if number > 1 else ""
    hint = "; -1 often stands for a label that is kept secret" if labels[row].as_py() == -1 else ""
    raise ValueError(
        f"Expected `label_column` {label_column!r} to have the index or name of a class in each row, but got "
        f"{labels[row].as_py()!r} in row {row}{others}{hint}."
    )


def _replace(
    dataset: datasets.Dataset, label_column: str, labels: "pa.Array | pa.ChunkedArray", feature: Any
) -> datasets.Dataset:
    """The data set with another column of labels."""
    values, new = labels.to_numpy().astype(np.int64), f"{label_column} as index"
    dataset = dataset.add_column(new, values, feature=feature)  # before the other goes, which may be the only one
    return dataset.remove_columns(label_column).rename_column(new, label_column)
