"""Start a training script as `accelerate launch` does, from another process of this package."""

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..terminal import DEBUG, INTERRUPTED

# options of Accelerate, of which it takes one
LAUNCHERS = ("multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm")


def launch(script: Path, arguments: list[str], accelerate_options: list[str]) -> int:
    """
    Run a script in processes of its own, on all GPUs, or else on the CPU with all cores.

    Where there is a configuration that `accelerate config` wrote, it decides instead.

    Args:
        script (`Path`): The file.
        arguments (`list[str]`): Its command line.
        accelerate_options (`list[str]`): Options of `accelerate launch`, which come first.

    Returns:
        `int`: The exit status of the script; of several processes, of the first that failed.

    Raises:
        ValueError: if an option of Accelerate is unknown, or does not fit the others.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if DEBUG not in arguments:  # torch's launcher tells at length of processes that fail
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parser = launch_command_parser()
    parser.error = _refuse
    defaults = _defaults(parser.parse_args([*accelerate_options, str(script)]))
    options = parser.parse_args([*defaults, *accelerate_options, str(script), *arguments])
    handlers = {number: signal.signal(number, _pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return _status(error.returncode)
    except ChildFailedError as error:
        return _status(error.get_first_failure()[1].exitcode)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _defaults(given: argparse.Namespace) -> list[str]:
    """
    What Accelerate would otherwise warn about, and take one CPU core for; nothing where the user has configured it.

    All devices are used, unless the user gave a number of processes or chose among the devices.
    """
    from accelerate.commands.config.config_args import default_config_file

    if os.path.isfile(default_config_file) or given.config_file is not None:
        return []
    defaults = ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no"]
    num_devices = _num_devices(given)
    if not num_devices:
        defaults += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS") or str(num_cores())]
    if given.num_processes is None:
        num_processes = max(1, num_devices) * (given.num_machines or 1)
        has_launcher = any(getattr(given, name) for name in LAUNCHERS)
        defaults += ["--num_processes", str(num_processes), *["--multi_gpu"] * (num_devices > 1 and not has_launcher)]
    return defaults


def _num_devices(given: argparse.Namespace) -> int:
    """The accelerators of this machine that the options leave; 0 for the CPU."""
    import torch

    if given.cpu:
        return 0
    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if given.gpu_ids in (None, "all"):
        return num_devices
    return min(num_devices, len(given.gpu_ids.split(",")))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"Expected options of `accelerate launch` before `--`, but got others: {message}")


def _pass_on(number: int, frame: FrameType | None) -> Any:
    """Leave it to the script to end in order. A terminal sends its interrupt to the script itself, others send it here alone."""
    import psutil

    has_terminal = any(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    if number != signal.SIGINT or not has_terminal:
        for child in psutil.Process().children():
            child.send_signal(number)


def _status(returncode: int) -> int:
    """The exit status, as shells have it: an interrupt is 130."""
    if returncode == -signal.SIGINT:
        return INTERRUPTED
    return 128 - returncode if returncode < 0 else returncode
