"""Describe LoRA files and folders with them: which noise each file owns, its rank, its alpha, and the model that it is for."""

import itertools
from pathlib import Path
from typing import Any

from ..plugins.lora_files import LoraFile, is_lora, noise_in_words, read_lora_file
from ..plugins.lora_folders import read_lora_config
from ..saving.adapters import LORA_CONFIG
from ..saving.weight_files import safetensors_header

# the model, in the metadata of others: the standard of ModelSpec, and kohya's
_MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_NO_INTERVAL = "none: its metadata names no interval"


def described_loras(path: Path) -> dict[str, Any] | None:
    """
    Describe a LoRA file, or a folder with LoRA files alone.

    Args:
        path: A file, or a folder.

    Returns:
        `dict`, by names for people to read; None for a folder that has a configuration or no LoRA.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if a file is damaged, or holds no LoRA.
    """
    if path.is_file():
        return _file_rows(read_lora_file(path))
    if any((path / name).is_file() for name in ("model_index.json", "config.json", LORA_CONFIG)):
        return None
    files = [file for file in sorted(path.glob("*.safetensors")) if is_lora(safetensors_header(file))]
    return {file.name: _file_rows(read_lora_file(file)) for file in files} or None


def expert_rows(folder: Path) -> dict[str, Any]:
    """
    Describe LoRA experts that were saved together.

    Args:
        folder: The folder with their `lora_experts.json`, and with their files if those were downloaded.

    Returns:
        `dict[str, Any]`: The rows `model`, `noise` and `files`.
    """
    config = read_lora_config(folder)
    files = [folder / file for file in config["files"].values()]
    return {
        "model": config.get("denoiser"),
        "noise": experts_in_words(folder),
        "files": {file.name: _file_rows(read_lora_file(file)) for file in files if file.is_file()} or None,
    }


def experts_in_words(folder: Path) -> list[str]:
    """Say for each interval of saved LoRA experts, the least noise first, which adapters act in it."""
    config = read_lora_config(folder)
    edges = config["interval_edges"]
    return [
        f"{' and '.join(map(_adapter_in_words, entry)) or 'the model without adapters'}: {noise_in_words(low, high, edges[-1])}"
        for entry, (low, high) in zip(config["experts"], itertools.pairwise(edges))
    ]


def _adapter_in_words(each: dict[str, Any]) -> str:
    return each["adapter"] if each["weight"] == 1 else f"{each['weight']:g} times {each['adapter']}"


def _file_rows(file: LoraFile) -> dict[str, Any]:
    noise = file.noise
    model = noise.denoiser if noise is not None else None
    rows = {
        "noise": _NO_INTERVAL if noise is None else str(noise),
        "model": model or next((file.metadata[key] for key in _MODEL_KEYS if file.metadata.get(key)), None),
        "rank": _listing(file.ranks),
        "alpha": _listing(file.alphas) if file.alphas else "none, as if it were the rank",
        "weight": None if noise is None or set(noise.weights) == {1} else _listing(noise.weights),
        "base model file": file.metadata.get("ss_sd_model_name"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _listing(numbers: "list[Any] | tuple[float, ...]") -> Any:
    """A number, or several as a text."""
    plain = [int(number) if number == int(number) else number for number in numbers]
    return plain[0] if len(plain) == 1 else ", ".join(map(str, plain))
