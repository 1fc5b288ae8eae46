"""A progress bar on a terminal, lines in a file; durations in words."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.training.progress import duration, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written_by_a_run(monkeypatch, stderr: io.StringIO, seconds_per_update: float) -> str:
    """What a bar writes in a run of two hundred updates, by a clock that the test advances."""
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(210, "Training", "step", initial=10) as bar:
        for _ in range(200):
            clock[0] += seconds_per_update
            bar.update()
            bar.set_postfix(loss="0.5", refresh=False)
    return stderr.getvalue()


def test_a_file_gets_at_most_two_lines_a_minute(monkeypatch):
    text = written_by_a_run(monkeypatch, io.StringIO(), seconds_per_update=1.5)  # five minutes
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert lines[0] == "Training: 10 of 210 steps (5 %) in 00:00, ? to go"
    assert lines[1] == "Training: 30 of 210 steps (14 %) in 00:30, 04:30 to go, loss=0.5"
    assert lines[-1] == "Training: 210 of 210 steps (100 %) in 05:00, 00:00 to go, loss=0.5"
    assert len(lines) == 1 + 5 * 2  # the last one was due anyway


def test_a_terminal_gets_a_bar(monkeypatch):
    text = written_by_a_run(monkeypatch, Terminal(), seconds_per_update=1.5)
    assert text.count("\r") > 100 and "210/210" in text


def test_nothing_to_do(monkeypatch):
    """As where all shards are there already."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(0, "Encoding", "image"):
        pass
    assert sys.stderr.getvalue().splitlines() == ["Encoding: 0 of 0 images (0 %) in 00:00, ? to go"]


def test_an_error_repeats_no_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(ValueError), progress_bar(3, "Training", "step") as bar:
        bar.update()
        bar.set_postfix(loss="1.0")
        raise ValueError
    lines = sys.stderr.getvalue().splitlines()
    assert [line.split(" of")[0] for line in lines] == ["Training: 0", "Training: 1"]


def test_other_processes_write_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(3, "Training", "step", disable=True) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h"), (86_400, "1 d")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@given(st.integers(0, 10**7))
def test_a_duration_is_never_further_off_than_its_smaller_unit(seconds):
    units = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
    parts = duration(seconds).split()
    said = sum(int(amount) * units[unit] for amount, unit in zip(parts[::2], parts[1::2]))
    assert 0 <= seconds - said < (3600 if said >= 86_400 else 60 if said >= 3600 else 1)
