"""Checks of the values that come from outside: each returns the value, or says in plain words what is wrong with it.

Nothing has checked before what a browser or an API client sends: it may be anything that JSON can hold.
"""

import math
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 60  # characters of a wrong value in a message


class Refusal(ValueError):
    """An error that the user can correct; its message is shown to them."""


def shown(value: Any) -> str:
    """Return a value as a message shows it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def number(name: str, value: Any, low: float, high: float) -> float:
    """
    Check that a value is a number.

    Raises:
        Refusal: if it is not a finite number from `low` to `high`.
    """
    # in Python a bool is an int, and NaN is neither below nor above any number
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Refusal(f"Expected the {name} to be a number between {low:g} and {high:g}, but got {shown(value)}.")
    return float(value)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """
    Check that a value is a whole number, such as 25 or 25.0.

    Raises:
        Refusal: if it is not a whole number from `low` to `high`.
    """
    is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())
    if isinstance(value, bool) or not is_whole or not low <= value <= high:
        raise Refusal(f"Expected the {name} to be a whole number between {low} and {high}, but got {shown(value)}.")
    return int(value)


def one_of(name: str, value: Any, names: Iterable[str]) -> str:
    """
    Check that a value is one of some names.

    Raises:
        Refusal: if it is not one of `names`, the first of which are listed.
    """
    names = list(names)
    if not isinstance(value, str) or value not in names:
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise Refusal(f"Expected the {name} to be one of {listed}, but got {shown(value)}.")
    return value


def some_of(name: str, value: Any, names: Iterable[str]) -> list[str]:
    """
    Check that a value is a list of some names.

    Raises:
        Refusal: if it is not a list of at least one of `names`, each at most once.
    """
    names = list(names)
    if not isinstance(value, list) or not 1 <= len(value) <= len(names):
        raise Refusal(f"Expected the {name} to be a list of 1 to {len(names)} names, but got {shown(value)}.")
    chosen = [one_of(name, each, names) for each in value]
    if len(set(chosen)) < len(chosen):
        raise Refusal(f"Expected the {name} to be different, but got {shown(value)}.")
    return chosen


def yes_or_no(name: str, value: Any) -> bool:
    """
    Check that a value is true or false.

    Raises:
        Refusal: if it is neither.
    """
    if not isinstance(value, bool):
        raise Refusal(f"Expected {name} to be true or false, but got {shown(value)}.")
    return value
