"""`python -m benchmarks.comparison` as a user runs it: killed, within a time, and to its end."""

import json
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from benchmarks.comparison import data
from benchmarks.comparison.data import make_data
from comparison_plans import tiny_plan
from conftest import REPOSITORY

from diffusers_dmp.evaluation import judge

PATIENCE = 1800.0  # seconds that anything may take


def small_data(plan, results: Path, monkeypatch) -> None:
    """Make a data set of noise, which needs no files of Fashion-MNIST, and networks that are hardly trained."""
    chance = np.random.default_rng(0)
    images, labels = chance.integers(256, size=(600, 28, 28), dtype=np.uint8), chance.integers(10, size=600)
    monkeypatch.setattr(data, "fashion_images", lambda split="train": (images, labels))
    for steps in ("EXTRACTOR_STEPS", "GUIDE_STEPS"):
        monkeypatch.setattr(data, steps, 2)
    monkeypatch.setattr(judge, "NUM_STEPS", 10)
    make_data(plan, "fashion", results)


class Comparison:
    """The command, started in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "comparison.log"

    def start(self, *options: str) -> psutil.Popen:
        command = [sys.executable, "-m", "benchmarks.comparison", "--preset", self.folder / "tiny.yaml"]
        command += ["--results", self.folder / "results", "--report", self.folder / "page.md", *options]
        with open(self.log, "w") as log:
            return psutil.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=REPOSITORY)

    def wait(self, process: psutil.Popen) -> tuple[int, list[str]]:
        """Wait for the end, and return the exit status and the lines of the output."""
        return process.wait(PATIENCE), self.log.read_text().splitlines()

    def run(self, *options: str) -> tuple[int, list[str]]:
        return self.wait(self.start(*options))


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(folder: Path) -> list[int]:
    """The steps of all checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*[0-9]"))


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """One long training, whose checkpoints follow one another quickly."""
    sizes = {
        "max_train_steps": 10**6,
        "pipeline_steps": 10**6,
        "checkpointing_steps": 10,
        "batch_size": 2,
        "num_layers": 1,
    }
    plan = tiny_plan(tmp_path, long=sizes)
    monkeypatch.chdir(REPOSITORY)
    small_data(plan, tmp_path / "results", monkeypatch)
    return Comparison(tmp_path)


@pytest.mark.slow
def test_a_kill_loses_nothing_beyond_the_last_checkpoint(comparison):
    """Whoever is killed, all processes end, and the next call goes on from the last checkpoint."""
    folder = comparison.folder / "outputs" / "base" / "dit-0"

    def life(kill, status: int) -> list[str]:
        """Start the comparison, kill it after its first checkpoint, and return what it wrote."""
        before, written = max(steps(folder), default=0), read(folder / "training.log")
        process = comparison.start("--only", "base", "--workers", "1")
        wait_until(lambda: max(steps(folder), default=0) > before or process.poll() is not None)
        (worker,) = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
        everybody = [process, *process.children(recursive=True)]
        assert len(everybody) >= 3  # and the training
        last = max(steps(folder))
        kill(process, worker)
        found, lines = comparison.wait(process)
        _, alive = psutil.wait_procs(everybody, PATIENCE)
        assert not alive and found == status, lines
        assert max(steps(folder)) >= last
        began = re.search(r"Training: (\d+) of", read(folder / "training.log")[len(written) :])
        assert int(began.group(1)) == before
        return lines

    life(lambda main, worker: main.kill(), status=-signal.SIGKILL)
    life(lambda main, worker: (main.kill(), worker.kill()), status=-signal.SIGKILL)
    lines = life(lambda main, worker: worker.kill(), status=1)
    assert lines[0] == "base/dit-0: failed, its process ended with -9"
    assert lines[-1] == "Expected all runs to succeed, but 1 failed: base/dit-0."
    for signal_sent in (signal.SIGTERM, signal.SIGINT):
        lines = life(lambda main, worker, number=signal_sent: main.send_signal(number), status=130)
        line = "benchmarks.comparison: interrupted; the same command goes on: 2 of 2 runs left, no estimate yet"
        assert lines == [line]
    assert json.loads((folder / "seconds.json").read_text())["seconds"] > 0

    before, started = max(steps(folder)), time.monotonic()
    status, lines = comparison.run("--only", "base", "--workers", "1", "--minutes", "1.5")
    assert time.monotonic() - started < 90 and status == 0
    assert lines == [f"{comparison.folder / 'page.md'} is written; 2 of 2 runs left, no estimate yet"]
    assert max(steps(folder)) > before


def read(path: Path) -> str:
    """The text of a file, which is empty if there is none."""
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
@pytest.mark.parametrize("only", ["dtr", "tuning", "snr_split", "guidance"])
def test_every_run_at_four_steps(tmp_path, monkeypatch, only):
    """The runs of a comparison, as `make compare` does them; a second call repeats only the one whose result was deleted."""
    plan = tiny_plan(tmp_path)
    monkeypatch.chdir(REPOSITORY)
    small_data(plan, tmp_path / "results", monkeypatch)
    comparison = Comparison(tmp_path)
    runs = [run for run in plan.runs if run.comparison == only]
    options = ["--only", only, "--inception", tmp_path / "results" / "extractors" / "fashion" / "extractor"]
    status, lines = comparison.run(*options)
    assert status == 0, lines
    assert len(lines) == len(runs) + 1  # and no progress bars
    assert {line.partition(": done in ")[0] for line in lines[:-1]} == {run.key for run in runs}
    assert lines[-1] == f"{tmp_path / 'page.md'} is written; all {len(runs)} runs are done"
    page = (tmp_path / "page.md").read_text()
    assert all(run.title in page for run in runs if run.measured) and "FID, Inception" in page
    results = tmp_path / "results" / "tiny" / only
    assert {path.stem for path in results.glob("*.json")} == {f"{run.name}-0" for run in runs}
    assert {path.stem for path in results.glob("*.png")} == {f"{run.name}-0" for run in runs if run.measured}

    last = [run for run in runs if run.measured][-1]
    before = json.loads((results / f"{last.name}-0.json").read_text())
    (results / f"{last.name}-0.json").unlink()
    assert before["points"][-1]["FID_inception"] == before["points"][-1]["FID"]  # here, by the same network
    status, lines = comparison.run(*options)
    assert status == 0 and len(lines) == 2 and lines[0].startswith(f"{last.key}: done in "), lines
    after = json.loads((results / f"{last.name}-0.json").read_text())
    assert after == before | {"seconds": after["seconds"]}
