"""Checkpoints of a training: folders `checkpoint-<step>`, written whole or not at all, and read only if they are whole."""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from ..saving.whole import finish, remove, unfinished_path
from .arguments import LoopArguments
from .resources import explained_disk_errors

PREFIX = "checkpoint-"
RECORD_NAME = "checkpoint.json"  # the other files' sizes, and what the run must have again when it is resumed
# what every checkpoint has, the older ones without a record, too
REQUIRED_FILES = ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl")
BEST_NAME = "best_checkpoint.json"

logger = logging.getLogger(__name__)


def checkpoints(output_dir: "str | os.PathLike") -> list[Path]:
    """The folders of a training's checkpoints, in the order of their steps."""
    found = Path(output_dir).glob(f"{PREFIX}*")
    return sorted((path for path in found if path.is_dir() and is_named_like_one(path)), key=checkpoint_step)


def is_named_like_one(path: Path) -> bool:
    """Whether a path is called `checkpoint-<step>`."""
    return re.fullmatch(rf"{PREFIX}\d+", path.name, re.ASCII) is not None


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


def checkpoint_to_resume(args: LoopArguments, is_main_process: bool = True) -> Path | None:
    """
    The checkpoint that `args.resume_from_checkpoint` asks for; None for a training from the beginning.

    'latest' is the last one that can be read; a warning names those that are passed over.

    Args:
        args ([`LoopArguments`]): For the checkpoint, the output folder and the last step.
        is_main_process (`bool`): Whether to warn.

    Raises:
        ValueError: if it is not there, broken, or beyond `max_train_steps`, or if there are checkpoints and none was asked
            for.
    """
    if args.resume_from_checkpoint is None:
        expect_no_checkpoints(args.output_dir)
        return None
    if args.resume_from_checkpoint == "latest":
        path = latest_checkpoint(args.output_dir, logger.warning if is_main_process else logger.debug)
        if path is None:
            return None
    else:
        path = Path(args.resume_from_checkpoint)
        if not path.is_dir() or not is_named_like_one(path):
            raise ValueError(
                f"Expected `resume_from_checkpoint` to be 'latest' or a folder {PREFIX}<step>, "
                f"but got {args.resume_from_checkpoint!r}."
            )
        expect_readable(path)
    if checkpoint_step(path) > args.max_train_steps:
        raise ValueError(
            f"Expected `resume_from_checkpoint` to be within `max_train_steps` {args.max_train_steps}, but got {path}."
        )
    return path


def latest_checkpoint(output_dir: "str | os.PathLike", warn: Any = logger.warning) -> Path | None:
    """
    The last checkpoint in a folder that can be read.

    Args:
        output_dir: The folder of a training.
        warn (`Callable`): Is told, as a logger's methods are, of everything that is passed over.
    """
    passed_over = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path not in checkpoints(output_dir)]
    for path in sorted(passed_over):
        warn("%s is not a checkpoint: passed over.", path)
    for path in reversed(checkpoints(output_dir)):
        try:
            expect_readable(path)
        except ValueError as error:
            warn("%s Passed over.", error)
        else:
            return path
    warn("No checkpoint in %s: starting from the beginning.", output_dir)
    return None


def expect_readable(path: Path) -> None:
    """
    Check that a checkpoint has all of its files, whole, and that its weights are finite.

    Raises:
        ValueError: if not; the file and the reason are named.
    """
    files = read_record(path).get("files", dict.fromkeys(REQUIRED_FILES))
    for name, size in files.items():
        file = path / name
        problem = _problem(file, size)
        if problem is not None:
            raise ValueError(f"Expected {path} to be a whole checkpoint, but got {name}, which {problem}.")


def _problem(file: Path, size: int | None) -> str | None:
    """What is wrong with a file of a checkpoint; None if nothing is."""
    if not file.is_file():
        return "is missing"
    if size is not None and file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes instead of {size}"
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if not tensors.get_tensor(name).isfinite().all():
                        return f"has values that are not finite in {name!r}"
        elif file.suffix in (".bin", ".pkl"):  # of `torch.save`, which are archives with checksums
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"is damaged in {broken!r}"
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        return f"cannot be read: {error}"
    return None


def read_record(path: Path) -> dict[str, Any]:
    """
    What a checkpoint records of itself; nothing for those of version 0.2.

    Raises:
        ValueError: if the record is damaged.
    """
    try:
        return json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a whole checkpoint, but got {RECORD_NAME}, which cannot be read: {error}."
        ) from error


def save_checkpoint(accelerator: Accelerator, args: LoopArguments, step: int, record: dict[str, Any]) -> None:
    """
    Write a checkpoint with everything that resuming needs.

    The folder gets its name when it is complete, so that a run that is killed leaves no incomplete checkpoint.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`LoopArguments`]): For the output folder.
        step (`int`): The number of steps done.
        record (`dict[str, Any]`): What a run that is resumed from it must have again.

    Raises:
        OSError: if it cannot be written; nothing of it is left then, and everything earlier is as it was.
    """
    path = Path(args.output_dir, f"{PREFIX}{step}")
    unfinished = unfinished_path(path)
    if accelerator.is_main_process:
        remove(unfinished)  # what a killed run left
    accelerator.wait_for_everyone()
    with explained_disk_errors(path):
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            found = sorted(file for file in unfinished.rglob("*") if file.is_file())  # sharded weights are in folders
            files = {file.relative_to(unfinished).as_posix(): file.stat().st_size for file in found}
            text = json.dumps({"files": files, **record}, indent=2)
            (unfinished / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
            finish(path)  # a run that went back to an earlier checkpoint replaces the later ones


def remove_surplus_checkpoints(args: LoopArguments, step: int) -> None:
    """
    Remove old checkpoints beyond `checkpoints_total_limit`, but never the best.

    Args:
        args ([`LoopArguments`]): For the output folder and the number of checkpoints to keep.
        step (`int`): The number of steps done.
    """
    if args.checkpoints_total_limit is None:
        return
    # the later ones, which a run that went back to an earlier checkpoint has yet to replace, do not count
    done = [checkpoint for checkpoint in checkpoints(args.output_dir) if checkpoint_step(checkpoint) <= step]
    best = recorded_best(args.output_dir)
    for surplus in done[: -args.checkpoints_total_limit]:
        if best is None or checkpoint_step(surplus) != best["step"]:
            remove(surplus)
