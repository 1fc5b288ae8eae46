"""How a command ends: a user's error is one line and the exit status 2, and `--debug` shows the traceback."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

DEBUG = "--debug"
DEBUG_HELP = "Show the traceback of an error."
USER_ERROR, INTERRUPTED = 2, 130  # exit statuses
OLD_NAMES_UNTIL = "0.4"
_SECONDS_FOR_MAIN = 10.0
# by name, because importing them takes time: the Hub's client does not wrap all errors of the connection in an OSError, and a
# damaged file of weights has an error of its own
_USERS_ERRORS = {
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("safetensors", "SafetensorError"),
    ("safetensors_rust", "SafetensorError"),
}


def run_command(command: Callable[[list[str]], Any], argv: list[str] | None = None, name: str | None = None) -> Any:
    """
    Run a command; a user's error is written as one line, and ends the process with the exit status 2.

    Errors of a user are `ValueError`, `OSError`, `ImportError` and those of YAML and safetensors. With `--debug` in the command line, and for
    all other errors, there is a traceback. Of several processes the first one writes the line.

    Args:
        command (`Callable[[list[str]], Any]`): Takes the command line without `--debug`.
        argv (`list[str]`, *optional*): The command line; the process's own by default.
        name (`str`, *optional*): The name that begins the line; by default the script's.

    Returns:
        What the command returns.

    Raises:
        SystemExit: after an error of a user, or an interrupt.
    """
    arguments = sys.argv[1:] if argv is None else argv
    name = name or Path(sys.argv[0]).stem
    try:
        return command([argument for argument in arguments if argument != DEBUG])
    except (Exception, KeyboardInterrupt) as error:
        if DEBUG in arguments or not (is_users_error(error) or isinstance(error, KeyboardInterrupt)):
            raise
        if isinstance(error, KeyboardInterrupt):
            write_line(f"{name}: interrupted")
            raise SystemExit(INTERRUPTED) from error
        write_line(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
        raise SystemExit(USER_ERROR) from error


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, for [`run_command`], and whose options are not abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise a `ValueError`, where argparse would write several lines and end the process."""
        raise ValueError(message)


def is_users_error(error: BaseException) -> bool:
    """Whether an error is about what a user gave, or about files and the network, rather than about this package."""
    is_known = any((base.__module__.partition(".")[0], base.__name__) in _USERS_ERRORS for base in type(error).__mro__)
    return is_known or isinstance(error, (ValueError, OSError, ImportError, yaml.YAMLError))


def write_line(line: str) -> None:
    """Write a line to stderr; a process that is not the first of several ones gives the first the time to do it."""
    if int(os.environ.get("RANK", 0)) > 0:
        # The same error mostly ends the first process as well, upon which the launcher ends this one while it sleeps.
        time.sleep(_SECONDS_FOR_MAIN)
    print(line, file=sys.stderr, flush=True)


def with_new_names(argv: list[str], new_names: Mapping[str, str]) -> list[str]:
    """
    A command line in which options that had other names have their present ones; each is warned about.

    Args:
        argv (`list[str]`): The command line.
        new_names (`Mapping[str, str]`): The present names by the old ones, all without the leading dashes.
    """
    renamed = []
    for token in argv:
        option, equals, value = token.partition("=")
        old = option.removeprefix("--").replace("-", "_")
        if option.startswith("--") and old in new_names:
            warn_of_old_name(option, f"--{new_names[old]}")
            token = f"--{new_names[old]}{equals}{value}"
        renamed.append(token)
    return renamed


def warn_of_old_name(old: str, new: str) -> None:
    """Warn that an argument has another name now."""
    warnings.warn(f"`{old}` is now `{new}`; the old name works until {OLD_NAMES_UNTIL}.", FutureWarning, stacklevel=3)
