"""Disk space and memory: looked at before the first step, and explained in one line when they do not suffice."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..saving.whole import remove, unfinished_path
from .arguments import LoopArguments

MEGABYTE, GIGABYTE = 1e6, 1e9
# torch.OutOfMemoryError is the accelerators'; the CPU's allocator raises a RuntimeError with these words
CPU_OUT_OF_MEMORY = "can't allocate memory"


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The size of some tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_output_dir(output_dir: "str | os.PathLike", needed: int) -> None:
    """
    Check, by writing a small file, that a folder can be written, and that there is enough space for what is to come.

    Args:
        output_dir: The folder, which is made if it is missing.
        needed (`int`): The bytes of one checkpoint and the pipeline.

    Raises:
        ValueError: if not.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=str(output_dir), prefix=".write-test-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"Expected `output_dir` to be a folder that can be written, but got {str(output_dir)!r}: {error.strerror}."
        ) from error
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise ValueError(
            f"Expected `output_dir` to have room for one checkpoint and the pipeline, about {in_words(needed)}, "
            f"but got {in_words(free)} of free space in {str(output_dir)!r}."
        )


def in_words(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / GIGABYTE:.1f} GB" if size >= GIGABYTE else f"{size / MEGABYTE:.1f} MB"


@contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """
    A context that only writes `unfinished_path(path)` and gives it its name.

    Args:
        path (`Path`): What is written.

    Raises:
        OSError: if it cannot be written, whatever the library that writes raises; nothing of it is left then.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError of another kind
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors raise the last two
        remove(unfinished_path(path))
        free = shutil.disk_usage(path.parent).free
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"Could not write {path} ({in_words(free)} are free there without it): {reason}. Everything earlier is as it "
            "was; with enough space, the same command with `--resume_from_checkpoint latest` goes on from the last checkpoint."
        ) from error


@contextmanager
def explained_memory_errors(accelerator: Accelerator, args: LoopArguments) -> Iterator[None]:
    """
    A context whose lack of memory is explained in one line.

    Args:
        accelerator (`Accelerator`): For the device and the number of processes.
        args ([`LoopArguments`]): For the batch, the image size and what already saves memory.

    Raises:
        ValueError: if the device or the computer has not enough memory; it says what helps.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise
        micro_batch = args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)
        raise ValueError(
            f"Expected micro-batches of {args.samples_in_words(micro_batch)} to fit into the memory of "
            f"{_device_memory(accelerator.device)}, but got out of memory. {_remedies(accelerator, args, micro_batch)}"
        ) from error


def _device_memory(device: torch.device) -> str:
    """A device and its memory in words."""
    if device.type != "cuda":
        return f"the device {device.type!r}"
    total = torch.cuda.get_device_properties(device).total_memory
    used = torch.cuda.max_memory_allocated(device)
    name = torch.cuda.get_device_name(device)
    return f"{name} ({in_words(total)}, of which this training had {in_words(used)})"


def _remedies(accelerator: Accelerator, args: LoopArguments, micro_batch: int) -> str:
    """What helps, and is not done yet."""
    remedies = []
    if micro_batch > 1:
        steps = args.gradient_accumulation_steps * 2
        remedies.append(f"`--gradient_accumulation_steps {steps}`, with which the batch stays as it is")
    if not args.gradient_checkpointing:
        remedies.append("`--gradient_checkpointing true`")
    if accelerator.mixed_precision == "no":
        remedies.append("`--mixed_precision bf16`")
    return f"What helps: {'; '.join(remedies or ['a smaller model or image size'])}."
