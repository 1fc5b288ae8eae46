"""What every group of arguments is made of: fields with a help text, and checks of numbers."""

import dataclasses
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with its default and its help text; a list is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


class NumberChecks:
    """Checks of the numbers in a dataclass of arguments."""

    def check_at_least_one(self, *names: str) -> None:
        """
        Check that numbers are positive.

        Raises:
            ValueError: if one of the arguments `names` is below 1.
        """
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {getattr(self, name)}.")
