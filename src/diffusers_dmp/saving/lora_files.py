"""LoRA files with the noise levels that they are for: Diffusers' format, and the intervals in the file's metadata.

The metadata of a safetensors file is a dictionary of strings:

- `lora_adapter_metadata`: Diffusers' own, the settings of PEFT such as `transformer.r` and `transformer.lora_alpha`, as JSON;
- `modelspec.timestep_range`: "875,1000", the standard for models of a part of the timesteps
  (https://github.com/Stability-AI/ModelSpec), which kohya's trainers write, too;
- `diffusers_dmp`: what this package adds, as JSON: all intervals with the weights that they are used with, T, and the denoiser.

Legend: T training timesteps.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .mixins import check_version
from .reading import read_json
from .version import __version__
from .weight_files import safetensors_header
from .whole import written_whole

LORA_CONFIG = "lora_experts.json"  # beside the files of adapters that belong together
SETTINGS_KEY, RANGE_KEY, INTERVALS_KEY = "lora_adapter_metadata", "modelspec.timestep_range", "diffusers_dmp"
RANGE_OF = 1000  # T of `modelspec.timestep_range`, which does not say it
# of PEFT's settings: those of the training, and of where it was
_LEFT_OUT = ("base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "revision", "task_type")
_CHANGE_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")
_DOWN = re.compile(r"lora_A\.|lora_down\.|lora\.down\.|lora_embedding_A")
_LORA_KEY = re.compile(r"\.lora_|\.lora\.|_lora\.")
_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")


@dataclass(frozen=True)
class OwnedNoise:
    """
    The noise levels that a LoRA is for.

    Args:
        intervals (`tuple[tuple[float, float], ...]`): From which timestep to below which one.
        weights (`tuple[float, ...]`): The weight in each of them.
        num_train_timesteps (`int`): T.
        denoiser (`str`, *optional*): The class of the denoiser.
    """

    intervals: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]
    num_train_timesteps: int
    denoiser: str | None = None

    @property
    def merged(self) -> list[tuple[float, float]]:
        """The intervals, ascending; those that touch as one."""
        merged: list[tuple[float, float]] = []
        for low, high in sorted(self.intervals):
            if merged and low <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return merged

    @property
    def is_everything(self) -> bool:
        """Whether it is for all noise levels."""
        return self.merged == [(0, self.num_train_timesteps)]

    def is_same(self, other: "OwnedNoise") -> bool:
        """Whether the noise levels are the same, to within one timestep."""
        mine, others = self.merged, other.merged
        return (
            self.num_train_timesteps == other.num_train_timesteps
            and len(mine) == len(others)
            and all(math.dist(a, b) < 1 for a, b in zip(mine, others))
        )

    def __str__(self) -> str:
        return ", ".join(noise_in_words(low, high, self.num_train_timesteps) for low, high in self.merged)


def noise_in_words(low: float, high: float, num_train_timesteps: int) -> str:
    """Say which timesteps an interval has, and which σ they are in flow matching."""
    sigmas = f"σ {low / num_train_timesteps:g} to {high / num_train_timesteps:g} in flow matching"
    return f"timesteps {low:g} to {high:g} of {num_train_timesteps} ({sigmas})"


@dataclass(frozen=True)
class LoraFile:
    """
    What a LoRA file says about itself; its weights are not read.

    Args:
        path (`Path`): The file.
        ranks (`list[int]`): The ranks that occur, ascending.
        alphas (`list[float]`): The alphas that occur, ascending; empty if the file has none, which means those of the ranks.
        noise ([`OwnedNoise`], *optional*): What it is for, if it says so.
        metadata (`dict[str, str]`): All of its metadata.
    """

    path: Path
    ranks: list[int]
    alphas: list[float]
    noise: OwnedNoise | None
    metadata: dict[str, str]


def is_lora(header: Mapping[str, Any]) -> bool:
    """Tell whether the names in a safetensors file are those of a LoRA, in any of the usual layouts."""
    return any(_DOWN.search(name) for name in header)


def read_lora_file(path: "str | os.PathLike") -> LoraFile:
    """
    Read what a LoRA file says about itself.

    Args:
        path: A safetensors file in any layout.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is damaged, or holds no LoRA.
    """
    path = Path(path)
    header = safetensors_header(path)
    if not is_lora(header):
        raise ValueError(
            f"Expected {str(path)!r} to be a LoRA, but got {next(iter(header), 'an empty file')!r} in it."
        )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        alphas = {float(file.get_tensor(name)) for name in header if name.endswith(".alpha")}
    settings = adapter_settings(metadata, path) or {}
    for name, value in settings.items():
        if name.endswith("lora_alpha"):
            alphas.add(float(value))
        if name.endswith("alpha_pattern"):
            alphas.update(map(float, value.values()))
    ranks = {each["shape"][0] for name, each in header.items() if _DOWN.search(name)}
    return LoraFile(path, sorted(ranks), sorted(alphas), owned_noise(metadata, path), metadata)


def adapter_settings(metadata: Mapping[str, str], path: "str | os.PathLike") -> dict[str, Any] | None:
    """
    Read PEFT's settings from a file's metadata, where Diffusers has written them.

    Args:
        metadata (`Mapping[str, str]`): The metadata.
        path: The file, for the error.

    Raises:
        ValueError: if they are damaged.
    """
    return _parsed_metadata(metadata, SETTINGS_KEY, path)


def owned_noise(metadata: Mapping[str, str], path: "str | os.PathLike") -> OwnedNoise | None:
    """
    Read from a file's metadata which noise levels it is for; None if it does not say so.

    Args:
        metadata (`Mapping[str, str]`): The metadata.
        path: The file, for the error.

    Raises:
        ValueError: if it says so, but not as it should.
    """
    saved = _parsed_metadata(metadata, INTERVALS_KEY, path)
    try:
        if saved is not None:
            intervals = tuple((float(low), float(high)) for low, high in saved["intervals"])
            weights = tuple(map(float, saved["weights"]))
            return OwnedNoise(intervals, weights, int(saved["num_train_timesteps"]), saved.get("denoiser"))
        if metadata.get(RANGE_KEY):
            low, high = map(float, metadata[RANGE_KEY].split(","))
            return OwnedNoise(((low, high),), (1.0,), RANGE_OF)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the metadata of {str(path)!r} to name an interval, but got {metadata.get(INTERVALS_KEY) or metadata[RANGE_KEY]}."
        ) from error
    return None


def check_writable(name: str, tensors: Mapping[str, torch.Tensor], config: Any) -> None:
    """
    Check that an adapter is a LoRA that a file can hold.

    Args:
        name (`str`): The adapter's name, for the error.
        tensors (`Mapping[str, torch.Tensor]`), config (`peft.LoraConfig`): See [`write_lora_file`].

    Raises:
        ValueError: if it is no LoRA, has weights besides, changed the model's own weights when it was initialised, or is
            offloaded.
    """
    wanted = f"Expected the adapter {name!r} to"
    for key, tensor in tensors.items():
        if not _LORA_KEY.search(f".{key}"):
            raise ValueError(f"{wanted} be a LoRA and nothing else, but got the weight {key!r}.")
        if tensor.is_meta:
            raise ValueError(f"{wanted} be in memory, but {key!r} is offloaded; switch offloading off to save it.")
    initialised = getattr(config, "init_lora_weights", True)
    if isinstance(initialised, str) and initialised.startswith(_CHANGE_WEIGHTS):
        raise ValueError(
            f"{wanted} leave the model's own weights as they are, but got `init_lora_weights={initialised!r}`, which changes them."
        )


def write_lora_file(
    path: "str | os.PathLike", tensors: Mapping[str, torch.Tensor], config: Any, prefix: str, noise: OwnedNoise
) -> None:
    """
    Write an adapter as a LoRA file that every pipeline's `load_lora_weights` reads; see also [`check_writable`].

    Args:
        path: The file.
        tensors (`Mapping[str, torch.Tensor]`): The adapter's weights, as `peft.get_peft_model_state_dict` returns them.
        config (`peft.LoraConfig`): Its configuration.
        prefix (`str`): The denoiser's name in pipelines, 'transformer' or 'unet'.
        noise ([`OwnedNoise`]): What it is for.
    """
    metadata = {
        "format": "pt",
        SETTINGS_KEY: _as_json({f"{prefix}.{name}": value for name, value in _needed_settings(config).items()}),
        INTERVALS_KEY: _as_json(
            {
                "intervals": noise.intervals,
                "weights": noise.weights,
                "num_train_timesteps": noise.num_train_timesteps,
                "denoiser": noise.denoiser,
                "version": __version__,
            }
        ),
    }
    if len(noise.merged) == 1 and not noise.is_everything:
        metadata[RANGE_KEY] = ",".join(f"{edge:.12g}" for edge in noise.merged[0])
    contiguous = {f"{prefix}.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as unfinished:
        save_file(contiguous, unfinished, metadata=metadata)


def read_lora_config(folder: Path) -> dict[str, Any]:
    """
    Read and check the `lora_experts.json` in a folder.

    Raises:
        ImportError: if a newer version of this package saved it.
        OSError: if there is none.
        ValueError: if it is damaged.
    """
    path = folder / LORA_CONFIG
    config = read_json(path)
    check_version(config)
    wanted: dict[str, Callable[[Any], bool]] = {
        "interval_edges": lambda value: isinstance(value, list) and len(value) > 1 and all(map(_is_number, value)),
        "files": lambda value: (
            isinstance(value, dict) and all(_FILE_NAME.fullmatch(str(file)) for file in value.values())
        ),
        "experts": lambda value: (
            isinstance(value, list)
            and len(value) == len(config["interval_edges"]) - 1
            and all(_is_interval_entry(entry, config["files"]) for entry in value)
        ),
    }
    for key, is_right in wanted.items():
        if not is_right(config.get(key)):
            raise ValueError(
                f"Expected {str(path)!r} to be that of LoRA experts, but got {config.get(key)!r} as {key!r}."
            )
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_interval_entry(entry: Any, files: Mapping[str, str]) -> bool:
    return isinstance(entry, list) and all(
        isinstance(each, dict) and str(each.get("adapter")) in files and _is_number(each.get("weight"))
        for each in entry
    )


def _needed_settings(config: Any) -> dict[str, Any]:
    """The settings without which an adapter would be another one: an older PEFT does not know all of the others."""
    defaults = type(config)().to_dict()
    needed = ("r", "lora_alpha", "target_modules")
    return {
        name: value
        for name, value in config.to_dict().items()
        if name in needed or (name not in _LEFT_OUT and value != defaults.get(name))
    }


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True, default=sorted)  # `target_modules` is a set


def _parsed_metadata(metadata: Mapping[str, str], key: str, path: "str | os.PathLike") -> dict[str, Any] | None:
    if not metadata.get(key):
        return None
    try:
        content = json.loads(metadata[key])
    except ValueError as error:
        raise ValueError(f"Expected `{key}` in the metadata of {str(path)!r} to be JSON, but got {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected `{key}` in the metadata of {str(path)!r} to be an object, but got {content!r}.")
    return content
