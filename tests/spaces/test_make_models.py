"""How the Space's pipelines are trained: in which order, several at a time, and not again what is done."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import REPOSITORY
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "spaces"))

import trainings
from make_models import TRAINED, main, ship
from showcase import SHIPPED
from trainings import Training, needed, plan, run_all

from diffusers_dmp.evaluation.fashion import write_labelled_images

PATIENCE = 120  # seconds that anything may take


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """The names of trainings, as they begin; what is trained is a record alone."""
    names = []

    def train(training: Training, folder: Path, threads: int, on_gpu: bool) -> float:
        names.append(training.name)
        if training.script == "broken":
            raise RuntimeError("no memory")
        (folder / trainings.RECORD).write_text(json.dumps({"seconds": 2.0}))
        return 2.0

    monkeypatch.setattr(trainings, "_run", train)
    return names


def some(**after: tuple[str, ...]) -> dict[str, Training]:
    """Trainings that come after others."""
    return {
        name: Training(name=name, script="train.py", options={"steps": 3}, after=each) for name, each in after.items()
    }


def test_the_plan_has_all_that_each_system_needs():
    all_trainings = plan(Path("data"), Path("work"))
    assert tuple(TRAINED) == SHIPPED
    assert set(needed(all_trainings, [name for names in TRAINED.values() for name in names])) == set(all_trainings)
    assert list(needed(all_trainings, TRAINED["dmp"])) == ["dit", "dmp"]
    for training in all_trainings.values():
        assert (REPOSITORY / training.script).is_file()
        assert set(training.after) < set(all_trainings)
        assert "config" not in training.options or (REPOSITORY / training.options["config"]).is_file()


def test_shorter_divides_the_steps_alone():
    long, short = (plan(Path("data"), Path("work"), shorter) for shorter in (1, 100))
    for name, training in short.items():
        numbers = {"max_train_steps", "num_images"} & set(training.options)
        assert training.options == long[name].options | {number: training.options[number] for number in numbers}
        assert all(training.options[number] < long[name].options[number] for number in numbers)


def test_trainings_come_after_what_they_need(tmp_path, started):
    run_all(some(last=("middle", "other"), middle=("first",), first=(), other=()), tmp_path, 2, 4, on_gpu=False)
    assert sorted(started) == ["first", "last", "middle", "other"] and started[-1] == "last"
    assert started.index("first") < started.index("middle")


def test_trainings_run_at_the_same_time(tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=10)  # which breaks unless all three are there

    def train(training: Training, folder: Path, threads: int, on_gpu: bool) -> float:
        together.wait()
        assert threads == 5
        return 1.0

    monkeypatch.setattr(trainings, "_run", train)
    run_all(some(one=(), two=(), three=()), tmp_path, 3, 16, on_gpu=True)


def test_what_is_done_is_not_done_again(tmp_path, started):
    run_all(some(first=(), last=("first",)), tmp_path, 1, 1, on_gpu=False)
    (tmp_path / "last" / trainings.RECORD).unlink()
    run_all(some(first=(), last=("first",)), tmp_path, 1, 1, on_gpu=False)
    assert started == ["first", "last", "last"]


def test_a_failure_stops_only_what_needs_it(tmp_path, started, capsys):
    broken = some(first=(), last=("first",), latest=("last",), other=())
    broken["first"] = Training(name="first", script="broken", options={})
    with pytest.raises(SystemExit, match="Expected all trainings to succeed, but 1 failed: first"):
        run_all(broken, tmp_path, 1, 1, on_gpu=False)
    assert started == ["first", "other"]
    assert "first: no memory" in capsys.readouterr().out


def test_another_training_in_the_same_folder_is_refused(tmp_path, started):
    run_all(some(first=()), tmp_path, 1, 1, on_gpu=False)
    other = {"first": Training(name="first", script="train.py", options={"steps": 4})}
    with pytest.raises(ValueError, match="Expected `steps` to be 3, as in the training first"):
        run_all(other, tmp_path, 1, 1, on_gpu=False)


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"learning_rate": 0.5, "lr_scheduler": "cosine"}, "Expected `preset.learning_rate` to be 0.25, as in"),
        ({"learning_rate": 0.25}, "Expected `preset` to be .'learning_rate', 'lr_scheduler'., as in"),
    ],
)
def test_another_preset_of_the_same_name_is_refused(tmp_path, started, changed, refused):
    preset = tmp_path / "preset.yaml"
    first = {"first": Training(name="first", script="train.py", options={"config": str(preset)})}
    preset.write_text(yaml.safe_dump({"learning_rate": 0.25, "lr_scheduler": "cosine"}))
    run_all(first, tmp_path, 1, 1, on_gpu=False)
    preset.write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match=f"{refused} the training first that .* write into another folder"):
        run_all(first, tmp_path, 1, 1, on_gpu=False)
    assert started == ["first"]


def test_a_failure_is_told_by_its_own_words(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    script = tmp_path / "broken.py"
    script.write_text("import sys; sys.exit('Expected `steps` to be 3.')")
    with pytest.raises(SystemExit):
        run_all({"first": Training(name="first", script=str(script), options={})}, tmp_path, 1, 1, on_gpu=False)
    log = tmp_path / "first" / "training.log"
    assert capsys.readouterr().out.endswith(f"but got 1: Expected `steps` to be 3. (see {log})\n")


def test_what_is_done_says_of_which_code_it_is_and_how_long_all_its_parts_took(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COMMIT", "abc1234")
    script = tmp_path / "first.py"
    script.write_text("import time; time.sleep(0.2)")  # tenths of a second are counted
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "seconds.json").write_text('{"seconds": 1000}')  # until it was interrupted
    first = {"first": Training(name="first", script=str(script), options={})}
    run_all(first, tmp_path, 1, 1, on_gpu=False)
    record = trainings.records_of(first, tmp_path)["first"]
    assert record["commit"] == "abc1234" and 1000 < record["seconds"] < 1600


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_trainings_end_with_what_started_them(tmp_path, number):
    """And until then, the command is refused where it works already."""
    script, written = tmp_path / "sleeps.py", tmp_path / "process_id"
    script.write_text(f"import os, time; open({str(written)!r}, 'w').write(str(os.getpid())); time.sleep({PATIENCE})")
    work = tmp_path / "work"
    code = f"""
import signal
import sys
sys.path.insert(0, "spaces")
import make_models
from diffusers_dmp.terminal import run_command

sleeping = make_models.plan(make_models.Path(), make_models.Path())["dtr"]
sleeping = type(sleeping)(name="dtr", script={str(script)!r}, options={{}})
make_models.plan = lambda *_: {{"dtr": sleeping}}
make_models.write_fashion = lambda folder: None
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
run_command(make_models.main, ["dtr", "--work", {str(work)!r}], name="make_models")
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: written.exists() and written.read_text() or process.poll() is not None)
    training = psutil.Process(int(written.read_text()))
    with pytest.raises(ValueError, match=f"Expected no other `make_models.py` to work in {work}, but one does"):
        main(["dtr", "--work", str(work)])
    process.send_signal(number)
    _, lines = process.communicate(timeout=PATIENCE)
    assert psutil.wait_procs([training], timeout=PATIENCE)[1] == []
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert (process.returncode, lines) == (130, "make_models: interrupted\n")
        assert (work / "dtr" / "seconds.json").exists()
    assert not (work / "dtr" / trainings.RECORD).exists()


def test_a_quick_trial_leaves_the_shipped_pipelines_alone(tmp_path):
    with pytest.raises(ValueError, match="Expected `output` to be a folder of its own with `shorter`"):
        main(["--shorter", "2", "--work", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()


def test_pictures_of_no_pipelines_are_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "old.png").write_text("old")
    with pytest.raises(ValueError, match=f"Expected {tmp_path / 'models'} to hold pipelines"):
        main(["examples", "--output", str(tmp_path)])
    assert (tmp_path / "pictures" / "old.png").read_text() == "old"


def test_what_is_shipped_stays_until_the_new_pipeline_is_whole(tmp_path):
    for folder in ("models/dtr", "work/dtr/pipeline"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(OSError):  # nothing is trained there
        ship("dtr", tmp_path / "work", tmp_path / "models" / "dtr")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["dtr"]


def test_unknown_names_and_numbers_are_refused():
    with pytest.raises(ValueError, match="Expected `names` to be among dtr, remix, dmp, patch, ppap, but got gpt"):
        main(["dtr", "gpt"])
    with pytest.raises(ValueError, match="Expected `jobs` to be at least 1, but got 0"):
        main(["dtr", "--jobs", "0"])


@pytest.mark.slow
def test_the_command_makes_everything(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        images, labels = rng.integers(256, size=(200, 28, 28), dtype=np.uint8), np.arange(200) % 10
        write_labelled_images(tmp_path / "data" / split / "images.parquet", images, labels)
    folders = {name: tmp_path / name for name in ("data", "work", "output")}
    command = [sys.executable, REPOSITORY / "spaces/make_models.py", "--shorter", "10000"]
    command += [str(part) for name, folder in folders.items() for part in (f"--{name}", folder)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    report = json.loads((folders["output"] / "models.json").read_text())
    assert set(report) == set(SHIPPED)
    assert all(0 <= system["recognised"] <= 1 and 1 < system["megabytes"] < 4 for system in report.values())
    assert set(report["ppap"]["training_seconds"]) == {"unconditional", "guide", "drawn", "ppap_experts"}
    assert Image.open(folders["output"] / "pictures/systems.png").size == (4 * (10 * 29 + 1), 4 * (5 * 29 + 1))
    assert Image.open(folders["output"] / "pictures/compare_all_4.png").size == (4 * (5 * 29 + 1), 4 * (4 * 29 + 1))
    again = subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert "begins" not in again.stdout
