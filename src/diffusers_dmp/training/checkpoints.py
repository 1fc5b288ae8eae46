"""Checkpoints of a training under way: `checkpoint-<step>` folders, written whole or not at all."""

import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..saving.whole import finish, unfinished_path
from .arguments import TrainingArguments

PREFIX = "checkpoint-"

logger = logging.getLogger(__name__)


def checkpoints(output_dir: "str | os.PathLike") -> list[Path]:
    """The checkpoints of a training, oldest first."""
    found = Path(output_dir).glob(f"{PREFIX}*")
    complete = [path for path in found if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(complete, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def expect_no_checkpoints(output_dir: "str | os.PathLike") -> None:
    """
    Raises:
        ValueError: if there are some, from which a later run would resume by mistake.
    """
    found = checkpoints(output_dir)
    if found:
        raise ValueError(
            "Expected `output_dir` to hold no checkpoints of an earlier run, or `resume_from_checkpoint` to be "
            f"'latest', but got {found[-1]}."
        )


def resume(accelerator: Accelerator, args: TrainingArguments) -> int:
    """
    Load what `resume_from_checkpoint` asks for, and return how many steps it has done.

    Raises:
        ValueError: if it is not there, or beyond `max_train_steps`, or if checkpoints are there and none was asked for.
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


def save_checkpoint(accelerator: Accelerator, args: TrainingArguments, step: int) -> None:
    """Everything that resuming needs. It gets its name when it is complete, so that a killed run leaves no half of one."""
    path = Path(args.output_dir, f"{PREFIX}{step}")
    unfinished = unfinished_path(path)
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(path)  # it may replace one of a later step that this run resumed before
        if args.checkpoints_total_limit is not None:
            # those of later steps, which such a run has yet to replace, do not count
            done = [checkpoint for checkpoint in checkpoints(args.output_dir) if checkpoint_step(checkpoint) <= step]
            for surplus in done[: -args.checkpoints_total_limit]:
                shutil.rmtree(surplus)
