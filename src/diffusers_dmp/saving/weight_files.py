"""Files of weights: what is damaged is named before it is loaded, and no code in them is executed.

Safetensors (https://github.com/huggingface/safetensors): 8 bytes with the header's length, the header as JSON, the tensors.
"""

import argparse
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .reading import beginning_of, expect_binary, read_json

WEIGHTS = "a file of weights"
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors
_AGAIN = "copy or download it again"
_CONFIGURATIONS = ("model_index.json", "config.json", "scheduler_config.json")


def read_weights(path: "str | os.PathLike") -> Any:
    """
    Read a safetensors file or a file of `torch.save`, by its content and whatever its name, without executing code in it.

    Args:
        path: The file.

    Returns:
        What it holds: of safetensors a `dict[str, torch.Tensor]`, else whatever was saved.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, of another kind, or needs code to be executed.
    """
    beginning = beginning_of(path, WEIGHTS)
    expect_binary(beginning, path, WEIGHTS)
    if _begins_as_safetensors(beginning):
        return read_safetensors(path)
    if beginning.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"Expected {str(path)!r} to be {WEIGHTS}, but it is cut off at the end; {_AGAIN}.")
    try:
        # `argparse.Namespace`: training arguments are saved in the same file. By its path, `torch.load` would go by its name.
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    # of a damaged file, the reader raises whatever its content leads to
    except Exception as error:
        raise ValueError(f"Expected {str(path)!r} to be {WEIGHTS}, but {_reason(error)}.") from error


def read_safetensors(path: "str | os.PathLike") -> dict[str, torch.Tensor]:
    """
    Read the tensors of a safetensors file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged or of another kind.
    """
    safetensors_header(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError) as error:  # such as an unknown dtype
        raise ValueError(f"Expected {str(path)!r} to be a safetensors file, but got {error}.") from error


def safetensors_header(path: "str | os.PathLike") -> dict[str, dict[str, Any]]:
    """
    Read the names, dtypes and shapes in a safetensors file, and check that all of their bytes are there.

    Args:
        path: The file.

    Returns:
        `dict[str, dict]`: `dtype`, `shape` and `data_offsets` of each tensor, by name.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged or of another kind.
    """
    kind = "a safetensors file"
    beginning = beginning_of(path, kind)
    wanted = f"Expected {str(path)!r} to be {kind}, but"
    expect_binary(beginning, path, kind)
    size, length = os.path.getsize(path), int.from_bytes(beginning[:8], "little")
    if len(beginning) > 8 and not _begins_as_safetensors(beginning):
        if beginning.startswith((b"PK", b"\x80")):  # which the length of a header can begin with, too
            raise ValueError(f"{wanted} got pickled weights; `diffusers-dmp convert` makes safetensors of them.")
        raise ValueError(f"{wanted} got another kind of file; {_AGAIN}.")
    if 8 + length > size:
        raise ValueError(f"{wanted} it ends after {size:,} bytes, within its header; {_AGAIN}.")
    try:
        with open(path, "rb") as file:
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((int(each["data_offsets"][1]) for each in header.values()), default=0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted} its header is damaged; {_AGAIN}.") from error
    if size != end:
        raise ValueError(f"{wanted} it has {size:,} bytes, not the {end:,} that its header says; {_AGAIN}.")
    return header


def saved_files(folder: "str | os.PathLike", pattern: str, components: bool = True) -> list[Path]:
    """
    List the files of a saved model or pipeline, without checkpoints of its training and hidden files.

    Args:
        folder: The folder; without it there are none.
        pattern (`str`): What the names match, such as '*.safetensors'.
        components (`bool`): Whether to look into its folders, too, which hold a pipeline's components.
    """
    found = [*Path(folder).glob(pattern), *(Path(folder).glob(f"*/{pattern}") if components else ())]
    named = {path: path.relative_to(folder).parts for path in found}
    return sorted(path for path, parts in named.items() if not any(_is_private(part) for part in parts))


def folder_sha256(folder: Path) -> str:
    """Hash weights and configurations, to notice when another model is saved in the same folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_saved_folder(folder: "str | os.PathLike", components: bool = True) -> None:
    """
    Check that a saved model or pipeline is whole: its configurations are JSON objects, its safetensors files have all their
    bytes, and no shard of an index is missing. Only headers are read.

    Args:
        folder: The folder; without it there is nothing to check.
        components (`bool`): Whether to check its folders, too, which hold a pipeline's components.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one is damaged or missing; it is named.
    """
    for name in _CONFIGURATIONS:
        for file in saved_files(folder, name, components):
            read_json(file)
    for file in saved_files(folder, "*.safetensors", components):
        safetensors_header(file)
    for index in saved_files(folder, "*.index*.json", components):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"Expected {str(index)!r} to have a `weight_map` of files by weight, but got none.")
        for name in sorted(set(map(str, weight_map.values()))):
            if not (index.parent / name).is_file():
                raise ValueError(
                    f"Expected {str(index.parent)!r} to hold {name!r}, which {index.name} names, but it is missing; {_AGAIN}."
                )


def expect_all_loaded(loading_info: dict[str, Any], source: "str | os.PathLike") -> None:
    """
    Refuse a model of which weights were not in its file: Diffusers only warns, and leaves them random.

    Args:
        loading_info (`dict`): What `from_pretrained(…, output_loading_info=True)` returns beside the model.
        source: Where the model is from, for the error.

    Raises:
        ValueError: if weights are missing; the first of them is named.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ValueError(
            f"Expected the weights in {str(source)!r} to be those of its configuration, but {len(missing)} are missing, such as "
            f"{missing[0]!r}; {_AGAIN}."
        )


def _is_private(name: str) -> bool:
    return name.startswith((".", "checkpoint-"))


def _begins_as_safetensors(beginning: bytes) -> bool:
    return beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= MAX_HEADER


def _reason(error: Exception) -> str:
    """Say in words why `torch.load` refused a file."""
    text = str(error)
    code = re.search(r"GLOBAL (\S+)", text)
    if code is not None:
        return (
            f"it needs the code `{code[1]}` to be executed; `torch.save(model.state_dict(), …)` writes tensors alone"
        )
    if isinstance(error, EOFError) or "EOF" in text:
        return f"it is cut off at the end; {_AGAIN}"
    return f"it is damaged, or of another kind; {_AGAIN}"
