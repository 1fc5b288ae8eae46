"""Read files of any origin; an error says in one line which file is wrong, why, and what to do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")
_SHOWN = 40  # characters of a text


def beginning_of(path: "str | os.PathLike", kind: str) -> bytes:
    """
    Read the first bytes of a file, which tell what it is.

    Args:
        path: The file.
        kind (`str`): What it should be, for the error, such as 'a JSON object'.

    Returns:
        `bytes`: At most 1024 of them.

    Raises:
        OSError: if there is no such file, it is a folder, or it may not be read.
        ValueError: if it is empty, or a Git LFS pointer or a web page stands in its place.
    """
    wanted = f"Expected {str(path)!r} to be {kind}, but"
    try:
        with open(path, "rb") as file:
            beginning = file.read(1024)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{wanted} there is no such file.") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{wanted} got a folder.") from error
    except PermissionError as error:
        folder = "a folder" if Path(path).is_dir() else "a file that may not be read; change its permissions"
        raise PermissionError(f"{wanted} got {folder}.") from error
    except OSError as error:
        raise OSError(f"{wanted} it cannot be read: {error.strerror}.") from error
    if not beginning:
        raise ValueError(f"{wanted} got an empty file; copy or download it again.")
    if beginning.startswith(_GIT_LFS):
        raise ValueError(f"{wanted} got a Git LFS pointer in its place; run `git lfs pull` in that folder.")
    if beginning.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith(_WEB_PAGE):
        raise ValueError(f"{wanted} got a web page; download the file itself (on the Hub: /resolve/, not /blob/).")
    return beginning


def expect_binary(beginning: bytes, path: "str | os.PathLike", kind: str) -> None:
    """
    Check that a file that should hold tensors or images is not a message that was saved in its place.

    Args:
        beginning (`bytes`), path, kind (`str`): See [`beginning_of`].

    Raises:
        ValueError: if it is text.
    """
    wanted = f"Expected {str(path)!r} to be {kind}, but got"
    # a character that was cut in two at the end is left out
    text = beginning.decode("utf-8", errors="ignore") if not _has_control_bytes(beginning) else ""
    if len(text.encode()) >= len(beginning) - 3 and text.strip():
        raise ValueError(f"{wanted} text that begins with {_one_line(text)!r}; copy or download it again.")


def read_json(path: "str | os.PathLike") -> dict[str, Any]:
    """
    Read a JSON object from a file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON, or not an object.
    """
    return _mapping(parsed_json(path), path, "a JSON object")


def parsed_json(path: "str | os.PathLike") -> Any:
    """
    Read any JSON value from a file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON.
    """
    return _parsed(path, "JSON", json.loads)


def read_yaml(path: "str | os.PathLike") -> dict[str, Any]:
    """
    Read a YAML mapping from a file; a file with comments alone is an empty one.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not YAML, or not a mapping.
    """
    content = _parsed(path, "YAML", yaml.safe_load)
    return _mapping({} if content is None else content, path, "a YAML mapping")


def read_text(path: "str | os.PathLike") -> str:
    """
    Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not text in UTF-8, or empty.
    """
    return _parsed(path, "text", str)


def _parsed(path: "str | os.PathLike", kind: str, parse: Callable[[str], Any]) -> Any:
    """The content of a text file, with or without a byte order mark."""
    beginning_of(path, kind)
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"Expected {str(path)!r} to be {kind}, but {_syntax_error(error)}.") from error


def _syntax_error(error: Exception) -> str:
    """Say in words where a text breaks the rules of its format."""
    if isinstance(error, UnicodeDecodeError):
        return "got text that is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno} is not: {error.msg}"
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # YAML's
        return f"line {mark.line + 1} is not: {getattr(error, 'problem', None) or 'it breaks its rules'}"
    return f"got {' '.join(str(error).split())[:160]}"


def _mapping(content: Any, path: "str | os.PathLike", kind: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"Expected {str(path)!r} to hold {kind}, but got {type(content).__name__}.")
    return content


def _has_control_bytes(beginning: bytes) -> bool:
    return any(byte < 32 and byte not in b"\t\n\r\f" for byte in beginning)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]
