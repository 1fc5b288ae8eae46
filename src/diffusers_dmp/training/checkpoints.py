"""Checkpoints of a training: folders `checkpoint-<step>`, written whole or not at all."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..saving.whole import finish, unfinished_path
from .arguments import SharedTrainingArguments

PREFIX = "checkpoint-"
BEST_NAME = "best_checkpoint.json"

logger = logging.getLogger(__name__)


def checkpoints(output_dir: "str | os.PathLike") -> list[Path]:
    """The folders of a training's complete checkpoints, in the order of their steps."""
    found = Path(output_dir).glob(f"{PREFIX}*")
    complete = [path for path in found if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(complete, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The number of steps that were done when a checkpoint was written."""
    return int(path.name.removeprefix(PREFIX))


def recorded_best(output_dir: "str | os.PathLike") -> dict[str, Any] | None:
    """What `best_checkpoint.json` says: `step` and `validation_loss` of the best checkpoint; None if there is no file."""
    path = Path(output_dir, BEST_NAME)
    return json.loads(path.read_text()) if path.is_file() else None


def expect_no_checkpoints(output_dir: "str | os.PathLike") -> None:
    """
    Check that a new run's folder is free of an earlier run's checkpoints, from which one would later resume by mistake.

    Raises:
        ValueError: if it is not.
    """
    found = checkpoints(output_dir)
    if found:
        raise ValueError(
            "Expected `output_dir` to hold no checkpoints of an earlier run, or `resume_from_checkpoint` to be "
            f"'latest', but got {found[-1]}."
        )


def resume(accelerator: Accelerator, args: SharedTrainingArguments) -> int:
    """
    Load the checkpoint that `args.resume_from_checkpoint` asks for, if any.

    Args:
        accelerator (`Accelerator`): With everything registered that a checkpoint holds.
        args ([`SharedTrainingArguments`]): For the checkpoint, the output folder and the last step.

    Returns:
        `int`: The number of steps that are done.

    Raises:
        ValueError: if it is not there, or beyond `max_train_steps`, or if there are checkpoints and none was asked for.
    """
    if args.resume_from_checkpoint is None:
        expect_no_checkpoints(args.output_dir)
        return 0
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(args.output_dir)
        if not found:
            logger.warning("No checkpoint in %s: starting from the beginning.", args.output_dir)
            return 0
        path = found[-1]
    else:
        path = Path(args.resume_from_checkpoint)
        if not path.is_dir() or not path.name.removeprefix(PREFIX).isdigit():
            raise ValueError(
                f"Expected `resume_from_checkpoint` to be 'latest' or a folder {PREFIX}<step>, "
                f"but got {args.resume_from_checkpoint!r}."
            )
    if checkpoint_step(path) > args.max_train_steps:
        raise ValueError(
            f"Expected `resume_from_checkpoint` to be within `max_train_steps` {args.max_train_steps}, but got {path}."
        )
    accelerator.load_state(str(path))
    return checkpoint_step(path)


def save_checkpoint(accelerator: Accelerator, args: SharedTrainingArguments, step: int) -> None:
    """
    Write a checkpoint with everything that resuming needs, and remove surplus old ones, but never the best.

    The folder gets its name when it is complete, so that a run that is killed leaves no incomplete checkpoint.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`SharedTrainingArguments`]): For the output folder and the number of checkpoints to keep.
        step (`int`): The number of steps done.
    """
    path = Path(args.output_dir, f"{PREFIX}{step}")
    unfinished = unfinished_path(path)
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(path)  # a run that went back to an earlier checkpoint replaces the later ones
        if args.checkpoints_total_limit is not None:
            # the later ones, which such a run has yet to replace, do not count
            done = [checkpoint for checkpoint in checkpoints(args.output_dir) if checkpoint_step(checkpoint) <= step]
            best = recorded_best(args.output_dir)
            for surplus in done[: -args.checkpoints_total_limit]:
                if best is None or checkpoint_step(surplus) != best["step"]:
                    shutil.rmtree(surplus)
