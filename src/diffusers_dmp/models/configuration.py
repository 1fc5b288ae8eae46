"""Constructor arguments: those that a model inherits from its parent class, and checks that several models share."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def extends_arguments(parent: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Give a constructor the arguments of its parent class without writing them down a second time.

    The decorated `__init__` has keyword-only arguments with defaults, its own, and `**parent_arguments` to pass on:

    ```py
    @register_to_config
    @extends_arguments(DiTModel)
    def __init__(self, *, sharing_ratio: float = 0.8, **parent_arguments: Any):
        super().__init__(**parent_arguments)
    ```

    Its signature becomes the parent's arguments followed by its own. `help()` shows this signature, positional arguments
    follow it, and Diffusers' `register_to_config` reads from it what to save. `__init__` is always called with all
    arguments, those that were not given at their default values.

    Args:
        parent (`type`): The parent class.

    Returns:
        `Callable`: The decorator.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        inherited = inspect.signature(parent.__init__).parameters.values()  # type: ignore[misc]
        own = [
            parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for parameter in inspect.signature(init).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        signature = inspect.Signature([*inherited, *own])

        @functools.wraps(init)
        def extended_init(self, *args: Any, **kwargs: Any) -> None:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{init.__qualname__}() {error}") from None
            bound.apply_defaults()
            _, *names = signature.parameters
            init(self, **{name: bound.arguments[name] for name in names})

        extended_init.__signature__ = signature  # type: ignore[attr-defined]
        return extended_init

    return decorate


def argument_names(cls: type) -> list[str]:
    """
    List the arguments of a class's constructor.

    Args:
        cls (`type`): The class.

    Returns:
        `list[str]`: Their names, without `self`.
    """
    _, *names = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return names


def check_positive(config: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """
    Check that numbers in a configuration are at least 1.

    Args:
        config (`Mapping[str, Any]`): The configuration.
        names (`tuple[str, ...]`): The entries to check.

    Raises:
        ValueError: if one of them is less than 1.
    """
    for name in names:
        if config[name] < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {config[name]}.")
