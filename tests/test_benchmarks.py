"""Every benchmark runs to its end; what it measures is not for a test to say."""

import pytest
import torch
from conftest import REPOSITORY

SLOW = [pytest.param(system, marks=pytest.mark.slow) for system in ("remix", "patch", "ppap")]


@pytest.mark.parametrize("system", ["dtr", "dmp", *SLOW])
def test_a_benchmark_runs(system, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import timing
    from benchmarks.__main__ import SYSTEMS

    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    ratios = list(SYSTEMS[system]("DiT-S/8", torch.device("cpu"), [torch.float32], [1, 2], False, 0.0))
    assert len({ratio.name for ratio in ratios}) == len(ratios) >= 4
    assert all(ratio.candidate_ms > 0 and ratio.rounds == 2 for ratio in ratios)
