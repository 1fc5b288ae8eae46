"""Class labels as users give them, by index or by name, and which index a name stands for."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

MAX_LISTED = 20  # names in a message; of more, the similar ones only


def checked_class_names(id2label: Mapping[Any, Any] | None) -> dict[int, str]:
    """
    Read class names by index; the result is sorted by index, also where the keys are strings ("10" before "2"), as in JSON.

    Args:
        id2label (`Mapping`, *optional*): Names by index, which is an `int` or a `str` of one.

    Returns:
        `dict[int, str]`: The names; empty for None.

    Raises:
        ValueError: if a key is no index (as where indices are given by name), an index occurs twice, or a name is no `str`.
    """
    names: dict[int, str] = {}
    for key, name in ({} if id2label is None else id2label).items():
        if not str(key).isdecimal():  # and no `int(key)`: it reads 1.5, True and "1_0" as well
            raise ValueError(
                f"Expected `id2label` to give names by index, such as {{0: 'cat'}}, but got the key {key!r}."
            )
        index = int(str(key))
        if index in names or not isinstance(name, str):
            raise ValueError(
                f"Expected `id2label` to give one name for each index, but got {name!r} for {key!r} as well."
            )
        names[index] = str(name)
    return dict(sorted(names.items()))


def find_class(name: str, id2label: Mapping[Any, Any] | None, argument: str = "class_labels") -> int:
    """
    Find the index of a class by its name, and never by its position: the class "2" is the one with this name.

    Args:
        name (`str`): The name, or one of its synonyms: "tench" for "tench, Tinca tinca". A whole name comes before a synonym.
        id2label (`Mapping`, *optional*): Names by index; see [`checked_class_names`].
        argument (`str`): The name of the user's argument, for messages.

    Returns:
        `int`: The index.

    Raises:
        ValueError: if no class has the name (the message lists similar ones), or several have it.
    """
    names = checked_class_names(id2label)
    whole = [index for index, each in names.items() if each == name]
    synonyms = [index for index, each in names.items() if name in map(str.strip, each.split(","))]
    found = whole or synonyms
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"Expected `{argument}` to name one class, but got {name!r}, which is the name of the classes {found}; give the index."
        )
    if not names:
        raise ValueError(f"Expected `{argument}` to be indices, as there are no names (`id2label`), but got {name!r}.")
    known = [synonym.strip() for each in names.values() for synonym in each.split(",")]
    hint = " An index is an `int`, without quotes." if name.isdecimal() else ""
    if len(known) <= MAX_LISTED:
        raise ValueError(f"Expected `{argument}` to be among {known}, but got {name!r}.{hint}")
    close = difflib.get_close_matches(name, known, n=5) or known[:5]
    raise ValueError(
        f"Expected `{argument}` to be among the {len(names)} classes, such as {close}, but got {name!r}.{hint}"
    )


def label_list(labels: Any, argument: str = "class_labels") -> list[int | str]:
    """
    Turn labels of any kind into a list of indices and names.

    Args:
        labels (`int`, `str`, a scalar of NumPy or PyTorch, or a list, array or tensor of shape (B,) of these): The labels.
        argument (`str`): The name of the user's argument, for messages.

    Returns:
        `list[int | str]`: One or B labels.

    Raises:
        ValueError: if there are none, or one is neither an integer nor a name: a truth value, a fraction, None, or a list.
    """
    if isinstance(labels, (torch.Tensor, np.ndarray, np.generic)):
        labels = labels.tolist()  # a scalar gives a number
    if not isinstance(labels, (list, tuple, range)):
        labels = [labels]
    if len(labels) == 0:
        raise ValueError(f"Expected `{argument}` to hold at least one label, but got none.")
    labels = [each.item() if getattr(each, "ndim", None) == 0 else each for each in labels]
    if not all(isinstance(each, (int, str)) and not isinstance(each, bool) for each in labels):
        raise ValueError(f"Expected `{argument}` to be integers or names, but got {labels}.")
    return labels
