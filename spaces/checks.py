"""Whether what comes in from outside is what was asked for: each check returns the value or says in plain words what is wrong.

Nothing that a browser or an API client sends has been looked at before; it is whatever JSON can hold.
"""

import math
from collections.abc import Iterable
from typing import Any

MAX_SHOWN = 60  # characters of a wrong value that its refusal repeats


class Refusal(ValueError):
    """Something that the user can put right; its text is shown to them."""


def shown(value: Any) -> str:
    """A value as a refusal repeats it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def number(name: str, value: Any, low: float, high: float) -> float:
    """
    Raises:
        Refusal: if it is not a finite number from `low` to `high`.
    """
    # a bool is an int to Python, and not a number is neither below nor above anything
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Refusal(f"Expected the {name} to be a number between {low:g} and {high:g}, but got {shown(value)}.")
    return float(value)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """
    Raises:
        Refusal: if it is not a whole number from `low` to `high`; 25.0 is one.
    """
    is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())
    if isinstance(value, bool) or not is_whole or not low <= value <= high:
        raise Refusal(f"Expected the {name} to be a whole number between {low} and {high}, but got {shown(value)}.")
    return int(value)


def one_of(name: str, value: Any, names: Iterable[str]) -> str:
    """
    Raises:
        Refusal: if it is not one of `names`; the first of them are listed.
    """
    names = list(names)
    if not isinstance(value, str) or value not in names:
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise Refusal(f"Expected the {name} to be one of {listed}, but got {shown(value)}.")
    return value


def some_of(name: str, value: Any, names: Iterable[str]) -> list[str]:
    """
    Raises:
        Refusal: if it is not a list of at least one of `names`, each at most once.
    """
    names = list(names)
    if not isinstance(value, list) or not 1 <= len(value) <= len(names):
        raise Refusal(f"Expected the {name} to be a list of 1 to {len(names)} names, but got {shown(value)}.")
    chosen = [one_of(name, each, names) for each in value]
    if len(set(chosen)) < len(chosen):
        raise Refusal(f"Expected the {name} to be different ones, but got {shown(value)}.")
    return chosen


def yes_or_no(name: str, value: Any) -> bool:
    """
    Raises:
        Refusal: if it is neither true nor false.
    """
    if not isinstance(value, bool):
        raise Refusal(f"Expected {name} to be true or false, but got {shown(value)}.")
    return value
