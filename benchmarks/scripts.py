"""Scripts that work for long, each in a folder of its own: they end with what started them, and their time is counted."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers_dmp.saving.reading import read_json
from diffusers_dmp.saving.whole import write_json

from . import watched

LOCK = "lock"  # held by what works in the folder
LOG = "training.log"
SECONDS_RECORD = "seconds.json"  # how long all parts of what was interrupted took
# what a training's result depends on, as Git's pathspecs; its preset is remembered with its settings
TRAINING_CODE = ["src/diffusers_dmp", ":(glob)training/*.py"]


def run_script(script: list[str], folder: Path, num_threads: int) -> None:
    """
    Run a training script, which ends in order, with a checkpoint, if this process is told to end or is killed.

    Not by `accelerate launch`: that would be one more process, which notices no end.

    Args:
        script (`list[str]`): The file, and its arguments.
        folder (`Path`): Of its log, and of its lock.
        num_threads (`int`): Its threads.

    Raises:
        RuntimeError: if it fails, with the last line that it wrote.
    """
    command = [sys.executable, "-m", watched.__name__, str(os.getpid()), *script]
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    with open(folder / LOCK, "w") as lock, open(folder / LOG, "ab") as log:
        # The script has the lock, too: that of a killed process may still be writing its last checkpoint.
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = log.tell()
        training = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, pass_fds=[lock.fileno()], start_new_session=True
        )
        try:
            status = training.wait()
        except BaseException:
            training.terminate()
            training.wait()
            raise
    if status:
        said = last_line(folder / LOG, start) or "it wrote nothing"
        raise RuntimeError(f"Expected the training to succeed, but got {status}: {said} (see {folder / LOG})")


def last_line(log: Path, start: int = 0) -> str:
    """Return the last line that says anything in a log's part, which is what a script says of an error; '' if there is none."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """
    Work in a folder where nothing else of the same kind does.

    Args:
        folder (`Path`): The folder, which is made if it is missing.
        what (`str`): The kind, such as 'comparison', for the error.

    Raises:
        ValueError: if another one works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Expected no other {what} to work in {folder}, but one does; wait for it, or end it."
            ) from error
        yield


@contextmanager
def counted_seconds(folder: Path) -> Iterator[None]:
    """Add the time within the context to that of a folder's work, also if it is interrupted."""
    started, before = time.monotonic(), seconds_spent(folder)
    try:
        yield
    finally:
        write_json(folder / SECONDS_RECORD, {"seconds": round(before + time.monotonic() - started, 1)})


def seconds_spent(folder: Path) -> float:
    """Return how long the parts of a folder's work took that have ended, apart from those that were killed."""
    record = folder / SECONDS_RECORD
    return read_json(record)["seconds"] if record.exists() else 0.0
