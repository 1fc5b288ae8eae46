"""How many processes read data beside the one that trains, and how many threads open images."""

import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch

MAX_WORKERS = 16  # 15 of them decode some 1,600 PNGs of 512 pixels in a second
MAX_THREADS = 16
BATCHES_PER_WORKER = 3  # two that it has read ahead, as `DataLoader` asks for, and one that is used
SHARED_MEMORY = "/dev/shm"  # where workers put their batches; containers often have 64 MB


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """The threads that decode or encode images at once, which PIL and zlib do without Python's lock."""
    return min(MAX_THREADS, num_cores())


def choose_workers(wanted: int | None, device: torch.device, batch_bytes: int) -> int:
    """
    Choose how many worker processes read data for this process.

    By default, on an accelerator: one for each core that this process has for itself but one, at most `MAX_WORKERS`, and no more
    than half of the free shared memory holds batches of. None on a CPU, where the model needs all cores, and reading takes the
    same time in any process. What is read does not depend on it.

    Args:
        wanted (`int`, *optional*): The number that the user asks for.
        device (`torch.device`): What the batches are for.
        batch_bytes (`int`): The size of a batch, about.
    """
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return 0
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, as torchrun says
    cores = num_cores() // num_processes - 1
    batches = _free_shared_memory() // 2 // num_processes // max(batch_bytes, 1)
    return max(0, min(cores, MAX_WORKERS, batches // BATCHES_PER_WORKER))


def num_bytes_of(item: Any) -> int:
    """The size of the tensors of one item of a data set, in a dictionary or by itself."""
    values: Iterable[Any] = item.values() if isinstance(item, dict) else [item]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _free_shared_memory() -> int:
    """In bytes; without end where it is no file system of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 2**62
