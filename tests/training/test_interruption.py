"""SIGTERM and Ctrl-C: the first ends a training with a checkpoint, the second at once; what is finished is not done again."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import REPOSITORY
from runs import TINY, logged, train_here, weights
from safetensors.torch import load_file

from diffusers_dmp import DiTModel
from diffusers_dmp.training import interruption, loop
from diffusers_dmp.training.checkpoints import checkpoints
from diffusers_dmp.training.interruption import Interruption


@pytest.fixture
def handlers():
    """What signals do must be as it was."""
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    yield
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_the_first_signal_ends_a_training_with_a_checkpoint(handlers, digits, tmp_path, monkeypatch, caplog, number):
    train_here(DiTModel, digits, tmp_path / "whole", checkpointing_steps=100, report_to="tensorboard")
    steps = loop.TrainingParts.losses

    def interrupted(parts, batch, own, expert=None):
        if parts.lr_scheduler.last_epoch == 2:  # within the third step
            signal.raise_signal(number)
        return steps(parts, batch, own, expert)

    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path / "run"
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as end:
        patch.setattr(loop.TrainingParts, "losses", interrupted)
        train_here(DiTModel, digits, run, checkpointing_steps=100, report_to="tensorboard")
    assert end.value.code == 128 + number
    assert f"Ended by {signal.Signals(number).name} after step 3, in {run / 'checkpoint-3'}" in caplog.text
    assert "--resume_from_checkpoint latest" in caplog.text
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"] and not (run / "pipeline").exists()

    AcceleratorState._reset_state(reset_partial_state=True)
    train_here(
        DiTModel, digits, run, checkpointing_steps=100, report_to="tensorboard", resume_from_checkpoint="latest"
    )
    assert all(torch.equal(tensor, weights(tmp_path / "whole")[name]) for name, tensor in weights(run).items())
    assert logged(run, "loss") == logged(tmp_path / "whole", "loss")


def test_one_request_may_arrive_twice_and_a_second_one_ends_at_once(handlers, monkeypatch, capfd):
    ended = []
    now = iter([0.0, 0.1, 10.0])
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(now))
    with Interruption(Accelerator(cpu=True)) as received:
        assert received.signal_received() is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # from the launcher, which the terminal interrupted as well
        assert received.signal_received() == signal.SIGINT
        monkeypatch.setattr(interruption.signal, "raise_signal", lambda number: ended.append(number))
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert capfd.readouterr().err.count("a second signal ends at once") == 1


def test_the_end_of_the_launcher_is_a_signal(monkeypatch):
    monkeypatch.setenv(interruption.LAUNCHED, "no")
    received = Interruption(Accelerator(cpu=True))
    assert received.signal_received() is None
    monkeypatch.setattr(interruption.os, "getppid", lambda: interruption.PARENT + 1)  # another process
    assert received.signal_received() == signal.SIGTERM
    monkeypatch.delenv(interruption.LAUNCHED)
    assert Interruption(Accelerator(cpu=True)).launcher is None  # a shell that ends is no reason to end


@pytest.mark.slow
def test_processes_end_together(digits, tmp_path):
    """Two processes under `accelerate launch`, of which one is told to end, with the processes that read its images."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--num_cpu_threads_per_process", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", str(REPOSITORY / "training" / "train_dit.py")]
    arguments = TINY | {"dataset": digits, "output_dir": tmp_path, "max_train_steps": 100_000, "checkpointing_steps": 50,
                        "dataloader_num_workers": 1}  # fmt: skip
    command += [f"--{name}={value}" for name, value in arguments.items()]
    with (tmp_path / "log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    while not checkpoints(tmp_path):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    trainings = [child for child in process.children() if "train_dit.py" in " ".join(child.cmdline())]
    assert len(trainings) == 2
    readers = trainings[1].children(recursive=True)  # whose images the present step may need
    assert readers
    for told in [*readers, trainings[1]]:
        told.send_signal(signal.SIGTERM)
    process.wait(120)
    text = (tmp_path / "log").read_text()
    step = int(re.search(r"Ended by SIGTERM after step (\d+)", text).group(1))
    assert (tmp_path / f"checkpoint-{step}" / "random_states_1.pkl").exists()


def test_finished_experts_are_skipped(digits, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(REPOSITORY / "training"))
    from test_patch_diffusion import TINY_UNET
    from train_patch_diffusion import PatchDiffusionTrainingArguments, train_patch_diffusion

    def train(output_dir: Path, **arguments) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        defaults = TINY_UNET | {"dataset": str(digits), "report_to": "none", "output_dir": str(output_dir)}
        train_patch_diffusion(PatchDiffusionTrainingArguments(**defaults, snr_boundaries=[0.25], **arguments))

    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "expert_0", tmp_path / "run" / "expert_0")  # as if interrupted after it
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", resume_from_checkpoint="latest")
    assert "Expert 0 in" in caplog.text and "is finished: skipped" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for denoiser in ("denoiser_0", "denoiser_1"):
        again, expected = (
            load_file(tmp_path / run / "pipeline" / denoiser / "diffusion_pytorch_model.safetensors")
            for run in ("run", "whole")
        )
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())


@pytest.mark.slow
def test_kills():
    """A short version of `python -m tests.kills`, whose figures are in docs/reliability.md."""
    result = subprocess.run([sys.executable, "-m", "tests.kills", "--kills", "3"], cwd=REPOSITORY, capture_output=True,
                            text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
