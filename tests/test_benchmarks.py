"""Every benchmark runs to its end. The ratios depend on the computer and are not tested."""

from importlib import import_module

import pytest
import torch
from conftest import REPOSITORY

SLOW = [pytest.param(system, marks=pytest.mark.slow) for system in ("remix", "patch", "ppap")]


@pytest.mark.parametrize("system", ["dtr", "dmp", *SLOW])
def test_a_benchmark_runs(system, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import timing
    from benchmarks.__main__ import BENCHMARKS

    assert system in BENCHMARKS
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    settings = timing.Settings("DiT-S/8", torch.device("cpu"), [torch.float32], [1, 2], compile=False, budget=0.0)
    ratios = list(import_module(f"benchmarks.{system}").run(settings))
    assert len({ratio.name for ratio in ratios}) == len(ratios) >= 4
    assert all(ratio.candidate_ms > 0 and ratio.rounds == 2 for ratio in ratios)
