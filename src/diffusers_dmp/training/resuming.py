"""Resumed runs: what must be as it was, and what may change."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.constants import SCALER_NAME
from torch import nn

from ..saving.reading import read_yaml
from .arguments import LoopArguments, OutputArguments
from .checkpoints import read_record
from .data.loop_data import LoopData

ARGUMENTS_NAME = "training_arguments.yaml"

# An argument decides what is learned, and may not change when a run is resumed, unless it is named here.
MAY_CHANGE = {
    # what is written, logged and kept
    *(field.name for field in dataclasses.fields(OutputArguments)),
    "expert",
    # how far and how fast it is optimised
    "max_train_steps", "learning_rate", "min_lr_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "ema_decay",
    # memory, speed and precision: the batches are the same
    "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "deterministic", "dataloader_num_workers",
    "compile",
    # folders may move: their contents are compared
    "dataset", "vae",
}  # fmt: skip
# validation and samples only look; the schedule of the learning rate; `gate_learning_rate` and the like are those of some parameters
MAY_CHANGE_PREFIXES, MAY_CHANGE_SUFFIX = ("validation_", "sample_", "lr_"), "learning_rate"
PATHS = ("dataset", "vae", "pretrained_model_name_or_path", "base_model")
CONTENTS = ("dataset", "vae")  # without a record, as version 0.2 wrote checkpoints, their paths must be the same

# left out of `training_arguments.yaml`, which may become the `--config` of another training
OF_ONE_COMMAND = ("resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_license")

MAX_SHOWN = 80  # characters of a value in an error

logger = logging.getLogger(__name__)


def may_change(name: str) -> bool:
    """Whether an argument may change when a run is resumed."""
    return name in MAY_CHANGE or name.startswith(MAY_CHANGE_PREFIXES) or name.endswith(MAY_CHANGE_SUFFIX)


def resolved_arguments(args: LoopArguments) -> dict[str, Any]:
    """The arguments as YAML holds them, with absolute paths where there are files."""
    values = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(args)))
    return _with_absolute_paths(values)


def _with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    paths = {name: values[name] for name in PATHS if isinstance(values.get(name), str)}
    return values | {name: os.path.abspath(path) for name, path in paths.items() if os.path.exists(path)}


def run_record(args: LoopArguments, model: nn.Module, data: LoopData, uses_loss_scaling: bool) -> dict[str, Any]:
    """
    What a checkpoint records of its run: the arguments, and what identifies model and data wherever they lie.

    Args:
        args ([`LoopArguments`]): Everything that can be set.
        model (`nn.Module`): The model, as it was handed to the training.
        data ([`LoopData`]): What it is trained on.
        uses_loss_scaling (`bool`): Whether it is trained in fp16, whose scaling of the loss is a part of the checkpoint.
    """
    identity = {"model": type(model).__name__, **data.identity(args)}
    return {"arguments": resolved_arguments(args), "identity": identity, "loss_scaling": uses_loss_scaling}


def expect_same_run(checkpoint: Path, record: dict[str, Any], args: LoopArguments) -> None:
    """
    Check that a run goes on with what its checkpoint was trained with, but for the arguments that may change.

    Args:
        checkpoint (`Path`): The checkpoint.
        record (`dict[str, Any]`): Of the run; see [`run_record`].
        args ([`LoopArguments`]): Its arguments; fields that are not recorded are taken to have been the default.

    Raises:
        ValueError: if not; all differences are listed.
    """
    recorded = read_record(checkpoint)
    arguments = recorded.get("arguments") or recorded_arguments(checkpoint.parent)
    if arguments is None:
        logger.warning("%s does not say what it was trained with: nothing is compared.", checkpoint)
        return
    found = differing_arguments(arguments, record["arguments"], args)
    if "identity" in recorded:
        found += differences(recorded["identity"], record["identity"])
    else:
        logger.warning(
            "%s is of an older version, which did not record its images and classes: they are not compared.",
            checkpoint,
        )
        found += differences(
            *({name: values.get(name) for name in CONTENTS} for values in (arguments, record["arguments"]))
        )
    if record["loss_scaling"] and not (checkpoint / SCALER_NAME).is_file():
        found.append("mixed_precision: without loss scaling → fp16")
    if found:
        raise ValueError(
            f"Expected the arguments and data that {checkpoint} was trained with, but got other ones: {'; '.join(found)}. "
            "To train the weights further in another way, start a new run from the pipeline, in another `output_dir`."
        )


def recorded_arguments(folder: Path) -> dict[str, Any] | None:
    """The arguments in a training's folder; None if there are none."""
    file = folder / ARGUMENTS_NAME
    return _with_absolute_paths(read_yaml(file)) if file.is_file() else None


def arguments_of_training(checkpoint: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint was trained with, of the arguments there are now but those of output and length."""
    recorded = read_record(checkpoint).get("arguments") or recorded_arguments(checkpoint.parent) or {}
    others = {"max_train_steps", *(field.name for field in dataclasses.fields(OutputArguments))}
    return {name: value for name, value in recorded.items() if name in now and name not in others}


def differing_arguments(recorded: Mapping[str, Any], now: Mapping[str, Any], args: Any) -> list[str]:
    """The arguments that may not change, and have changed."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }
    without_effect, renamed = getattr(args, "without_effect", ()), getattr(args, "renamed", {})
    recorded = {renamed.get(name, name): value for name, value in recorded.items()}
    fixed = {name: value for name, value in recorded.items() if not may_change(name) and name not in without_effect}
    fixed_now = {name: value for name, value in now.items() if not may_change(name)}
    added = {name: defaults[name] for name in fixed_now.keys() - recorded.keys()}
    found = differences(fixed | added, fixed_now)
    if bool(recorded.get("ema_decay")) != bool(now.get("ema_decay")):
        found += differences({"ema_decay": recorded.get("ema_decay")}, {"ema_decay": now.get("ema_decay")})
    return found


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, as `name: then → now`."""
    names = [*recorded, *(name for name in now if name not in recorded)]
    return [
        f"{name}: {_shown(recorded.get(name))} → {_shown(now.get(name))}"
        for name in names
        if recorded.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
    return f"{len(value)} {text}" if isinstance(value, list) else text
