"""The two ways in which the tests start a training, and what it leaves.

Both run on one device: the launched processes inherit the environment, in which `conftest` hides GPUs.
"""

import subprocess
import sys
from pathlib import Path

import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_dmp.training.arguments import DiTTrainingArguments
from diffusers_dmp.training.dit_family import train_dit

TINY = {
    "image_size": 8,
    "image_channels": 1,
    "random_flip": False,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "patch_size": 4,
    "batch_size": 16,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "checkpointing_steps": 2,
}


def launch(script: str, output_dir: Path, *, num_processes: int = 1, **arguments) -> None:
    """`accelerate launch` of a tiny training, in a process of its own."""
    launch_script(script, output_dir, num_processes, TINY | arguments)


def launch_script(script: str, output_dir: Path, num_processes: int, arguments: dict) -> str:
    """`accelerate launch` of an entry point with the given arguments. Returns what it wrote to stderr, progress bars included."""
    # with "--cpu", accelerate would start several processes through MPI alone, and here silently one
    kind = "--cpu" if num_processes == 1 else "--multi_gpu"
    command = [sys.executable, "-m", "accelerate.commands.launch", kind, "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--num_cpu_threads_per_process", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(REPOSITORY / "training" / script)]
    for name, value in (arguments | {"output_dir": str(output_dir)}).items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def launch_with_fsdp2(script: str, num_processes: int, arguments: dict) -> None:
    """An entry point with sharded weights, in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(REPOSITORY / "tests/training/sharded_launch.py"), str(REPOSITORY / "training" / script)]
    for name, value in arguments.items():
        command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def train_here(model_class, digits: Path, output_dir: Path, **arguments) -> None:
    """A tiny training in this process, which is faster."""
    config = TINY | {"dataset": str(digits), "output_dir": str(output_dir), "report_to": "none"} | arguments
    train_dit(model_class, DiTTrainingArguments(**config))


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def logged(output_dir: Path, name: str) -> dict[int, float]:
    (folder,) = {file.parent for file in (output_dir / "logs").glob("*/events*")}
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}
