"""`python -m tests.kills [--kills 20] [--seed 0]`: kill a short training at random moments, resume it, and compare.

A first training is left alone. A second one, of the same arguments, is killed again and again, each time in another way and
at another moment, and resumed with `--resume_from_checkpoint latest`. After each kill, everything that has its final name
must be whole; after the last one, the training is left to end, and must have lost nothing: every loss that it logged and every
weight is the first training's, bit for bit. Any difference ends the program with an AssertionError.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_dmp.evaluation.digits import NUM_IMAGES, write_image_folder
from diffusers_dmp.training.checkpoints import checkpoint_step, checkpoints, expect_readable
from diffusers_dmp.training.pipeline_output import CONFIGURATIONS

REPOSITORY = Path(__file__).parent.parent
ARGUMENTS = {
    "image_size": 8, "image_channels": 1, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "patch_size": 4, "batch_size": 16, "learning_rate": 1e-3, "lr_scheduler": "cosine", "ema_decay": 0.99,
    "logging_steps": 1, "checkpointing_steps": 20, "checkpoints_total_limit": 2, "pipeline_steps": 60,
}  # fmt: skip
STEPS_PER_KILL = 100  # so that the training does not end before the last kill
LONGEST_WAIT = 2.0  # seconds from the first step of a life to a kill
PATIENCE = 300.0  # seconds that anything may take

# the signal; who gets it; whether it is aimed at a moment when something is being saved
KINDS = [
    (signal.SIGKILL, "everybody", False),
    (signal.SIGKILL, "everybody", True),
    (signal.SIGTERM, "the training", False),
    (signal.SIGTERM, "the training", True),
    (signal.SIGTERM, "the launcher", False),
    (signal.SIGTERM, "everybody", False),
    (signal.SIGINT, "everybody", False),
]


@dataclass
class Kill:
    """One kill and what it left."""

    signal: signal.Signals
    target: str
    while_saving: bool
    step: int  # of the last checkpoint afterwards
    unfinished: int  # files and folders without a final name

    def row(self) -> str:
        """A row of the table in docs/reliability.md."""
        moment = "while saving" if self.while_saving else "any"
        return f"| {self.signal.name} | {self.target} | {moment} | {self.step} | {self.unfinished} |"


class Training:
    """A training in a folder, which is started again after each kill."""

    def __init__(self, dataset: Path, folder: Path, max_train_steps: int):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        arguments = ARGUMENTS | {"dataset": dataset, "output_dir": folder, "max_train_steps": max_train_steps}
        self.arguments = [f"--{name}={value}" for name, value in arguments.items()]

    def start(self, launched: bool) -> psutil.Popen:
        """Start or resume it, through `accelerate launch` or as a plain program."""
        command = [sys.executable]
        if launched:
            command += ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes", "1",
                        "--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
        command += [str(REPOSITORY / "training" / "train_dit.py"), *self.arguments, "--resume_from_checkpoint=latest"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            return psutil.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def event_files(self) -> int:
        """How many lives have come to their first step."""
        return len(list(self.folder.glob("logs/*/events*")))

    def unfinished(self) -> list[Path]:
        """What is being saved, or was when the training was killed."""
        return [*self.folder.glob("*.unfinished"), *self.folder.glob("*.removed")]

    def losses(self) -> list[tuple[int, float]]:
        """Every loss that a life logged, with its step."""
        events = (EventAccumulator(str(file)).Reload() for file in self.folder.glob("logs/*/events*"))
        return [
            (event.step, event.value)
            for file in events
            if "loss" in file.Tags()["scalars"]
            for event in file.Scalars("loss")
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """The finished pipeline's weights."""
        return load_file(self.folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")

    def kill(self, kind: tuple[signal.Signals, str, bool], moments: random.Random) -> Kill:
        """Start the training, kill it, wait until it is gone, and look at what it left."""
        number, target, while_saving = kind
        lives, before = self.event_files(), self.last_step()
        process = self.start(launched=target != "the training")
        wait_until(lambda: self.event_files() > lives, process)
        time.sleep(moments.uniform(0, LONGEST_WAIT))
        if while_saving:
            wait_until(self.unfinished, process)
        everybody = [process, *process.children(recursive=True)]
        if target == "everybody":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        code = process.wait(PATIENCE)
        _, alive = psutil.wait_procs(everybody, PATIENCE)
        assert not alive, f"{alive} outlived {number.name}"
        if target == "the training":
            assert code == 128 + number, f"expected the exit code {128 + number}, but got {code}"
        if number is not signal.SIGKILL:
            assert f"Ended by {number.name} after step {self.last_step()}" in self.log.read_text()
        assert self.last_step() >= before, "a checkpoint is lost"
        self.expect_whole()
        return Kill(number, target, while_saving, self.last_step(), len(self.unfinished()))

    def last_step(self) -> int:
        """The step of the last checkpoint."""
        return max(map(checkpoint_step, checkpoints(self.folder)), default=0)

    def expect_whole(self) -> None:
        """Check that everything with a final name can be read."""
        for checkpoint in checkpoints(self.folder):
            expect_readable(checkpoint)
        for pipeline in self.folder.glob("pipeline*"):
            if pipeline not in self.unfinished() and pipeline.name != CONFIGURATIONS:
                DiffusionPipeline.from_pretrained(pipeline)

    def finish(self) -> None:
        """Let it train to its end."""
        process = self.start(launched=True)
        assert process.wait(PATIENCE) == 0, self.log.read_text()[-3000:]


def wait_until(condition, process: psutil.Popen) -> None:
    """Ask again and again, as long as the process lives."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the training ended before it was killed"
        assert time.monotonic() < deadline, "the training does not come to its first step"
        time.sleep(0.0005)


def run(folder: Path, num_kills: int, seed: int) -> tuple[list[Kill], int]:
    """
    Kill a training `num_kills` times, and compare it with one that was left alone.

    Returns:
        The kills, and the number of logged losses that were compared.
    """
    dataset = write_image_folder(folder / "digits", range(0, NUM_IMAGES, 9))
    steps = num_kills * STEPS_PER_KILL
    left_alone, killed = (Training(dataset, folder / name, steps) for name in ("left_alone", "killed"))
    left_alone.finish()
    kinds = random.Random(seed).sample(KINDS * (1 + num_kills // len(KINDS)), num_kills)
    moments = random.Random(seed)
    kills = []
    for kind in kinds:
        kills.append(killed.kill(kind, moments))
        print(kills[-1].row(), flush=True)
    killed.finish()

    expected = dict(left_alone.losses())
    losses = killed.losses()
    different = [step for step, loss in losses if loss != expected[step]]
    assert not different, f"other losses in the steps {different}"
    weights = left_alone.weights()
    different = [name for name, tensor in killed.weights().items() if not torch.equal(tensor, weights[name])]
    assert not different, f"other weights: {different}"
    assert not killed.unfinished()
    return kills, len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| signal | who gets it | moment | last checkpoint afterwards | unfinished files |")
    print("| --- | --- | --- | --- | --- |")
    with TemporaryDirectory() as folder:
        kills, num_losses = run(Path(folder), args.kills, args.seed)
    kinds = Counter(kill.signal.name for kill in kills)
    print(f"\n{len(kills)} kills ({', '.join(f'{number} x {name}' for name, number in kinds.items())}), "
          f"{sum(kill.while_saving for kill in kills)} of them while something was saved: no broken file, the weights and "
          f"{num_losses} logged losses equal those of the training that was left alone, bit for bit.")  # fmt: skip


if __name__ == "__main__":
    main()
