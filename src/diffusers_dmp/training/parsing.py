"""From the command line and a YAML preset to a dataclass of arguments, and to a run of an entry point."""

import argparse
import dataclasses
import difflib
import functools
import operator
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from ..saving.reading import read_yaml
from ..saving.sources import check_source
from ..terminal import DEBUG, DEBUG_HELP, OneLineParser, run_command, warn_of_old_name, with_new_names
from .scripts import find_preset

# the arguments that name something to read: what it may be, besides a Hub id
SOURCES = {
    "dataset": "file or folder",
    "validation_dataset": "file or folder",
    "vae": "folder",
    "pretrained_model_name_or_path": "file or folder",
    "base_model": "folder",
    "pipeline": "folder",
    "super_resolution_pipeline": "folder",
}

Arguments = TypeVar("Arguments")


def renamed(**new_names: str) -> Callable[[type[Arguments]], type[Arguments]]:
    """
    A decorator of a dataclass whose fields had other names: those still work, with a FutureWarning.

    Args:
        new_names (`str`): The fields' names, each by its old name.
    """

    def decorate(cls: type[Arguments]) -> type[Arguments]:
        constructor = cls.__init__

        @functools.wraps(constructor)
        def __init__(self, **arguments: Any) -> None:
            for old in arguments.keys() & new_names.keys():
                warn_of_old_name(old, new_names[old])
                arguments[new_names[old]] = arguments.pop(old)
            constructor(self, **arguments)

        cls.__init__ = __init__  # type: ignore[method-assign]
        cls.renamed = new_names  # type: ignore[attr-defined]
        for old, new in new_names.items():
            setattr(cls, old, property(operator.attrgetter(new)))
        return cls

    return decorate


def run_entry_point(arguments_class: type[Arguments], run: Callable[[Arguments], object]) -> None:
    """
    Run an entry point with the arguments of the command line; a user's error is one line (see [`run_command`]).

    Args:
        arguments_class (`type`): The dataclass of its arguments.
        run (`Callable`): What is called with them.
    """

    def command(argv: list[str]) -> None:
        args = parse_arguments(arguments_class, argv)
        for name, kind in SOURCES.items():
            check_source(name, getattr(args, name, None), kind)
        run(args)

    run_command(command)


class _Parser(OneLineParser, HfArgumentParser):
    """A parser of a dataclass's fields."""


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """
    Read a preset, if the command line names one with `--config`, and let the command line override it.

    Args:
        arguments_class (`type`): The dataclass to fill.
        argv (`list[str]`, *optional*): The command line; the process's own by default.

    Returns:
        The filled dataclass.

    Raises:
        ValueError: if the preset or the command line has an unknown argument, for which the valid ones are listed, or a
            value of another type.
    """
    # without abbreviations: one of `--config` would be no preset, and others change their meaning with the next argument
    parser = _Parser(arguments_class)
    parser.add_argument("--config", help="A YAML preset of the arguments above, which the command line overrides.")
    parser.add_argument(DEBUG, action="store_true", help=DEBUG_HELP)
    argv = with_new_names(sys.argv[1:] if argv is None else argv, getattr(arguments_class, "renamed", {}))
    argv = _with_values(argv, arguments_class)
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config = config_parser.parse_known_args(argv)[0].config
    if config is not None:
        parser.set_defaults(**_read_preset(find_preset(config), arguments_class))
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [f"--{field.name}" for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], options, 1)
        hint = f"did you mean {similar[0]}?" if similar else "`--help` lists them."
        raise ValueError(f"Expected known arguments, but got {' '.join(unknown)}; {hint}")
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


def _with_values(argv: list[str], arguments_class: type) -> list[str]:
    """A command line in which switches without a default of their own, too, may be bare for true, or `--no_…` for false."""
    types = typing.get_type_hints(arguments_class)
    switches = [f"--{field.name}" for field in dataclasses.fields(arguments_class) if types[field.name] == bool | None]
    values = {switch.replace("--", "--no_", 1): f"{switch}=false" for switch in switches}
    bare = {switch: f"{switch}=true" for switch in switches}
    return [
        (values | bare if following is None or following.startswith("--") else values).get(token, token)
        for token, following in zip(argv, [*argv[1:], None])
    ]


def _read_preset(path: Path, arguments_class: type) -> dict[str, Any]:
    """The arguments that a preset sets, checked."""
    preset = read_yaml(path)
    for name in preset.keys() & getattr(arguments_class, "without_effect", ()):
        warnings.warn(
            f"`{name}` in {path} never had an effect, and is refused from 0.4 on.", FutureWarning, stacklevel=3
        )
        del preset[name]
    for old, new in getattr(arguments_class, "renamed", {}).items():
        if old in preset:
            warn_of_old_name(old, new)
            preset[new] = preset.pop(old)
    types = typing.get_type_hints(arguments_class)
    valid = [field.name for field in dataclasses.fields(arguments_class)]  # type: ignore[arg-type]
    unknown = [str(name) for name in preset if name not in valid]
    if unknown:
        raise ValueError(f"Expected the preset {path} to set {', '.join(valid)}, but got {', '.join(unknown)}.")
    for name, value in preset.items():
        if not _fits(value, types[name]):
            raise ValueError(f"Expected `{name}` in {path} to be {_type_name(types[name])}, but got {value!r}.")
    return preset


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits a field's type. The parser turns a string into a number itself: YAML reads 1e-4 as one."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, options[0]) for each in value)
    if options:  # an optional one
        return any(_fits(value, option) for option in options)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True
    if hint is str:
        return isinstance(value, (str, int, float))  # `expert: 0`, and `mixed_precision: no`, which is false
    return isinstance(value, str) or type(value) is hint


def _type_name(hint: Any) -> str:
    """A field's type in words."""
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
