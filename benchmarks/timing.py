"""Two ways of doing one thing, timed by turns, so that whatever else the machine does meets both alike."""

import ctypes
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Ratio:
    """
    Args:
        name (`str`): What is compared with what.
        rounds (`int`): How often.
        ratio (`float`): Median of the rounds' ratios, `candidate` over `baseline`.
        low, high (`float`): Their quartiles.
        candidate_ms, baseline_ms (`float`): Median times in milliseconds.
        target (`float`, *optional*): What the ratio should not exceed.
    """

    name: str
    rounds: int
    ratio: float
    low: float
    high: float
    candidate_ms: float
    baseline_ms: float
    target: float | None = None

    def row(self) -> str:
        verdict = "" if self.target is None else f"≤ {self.target:.2f} {'✓' if self.ratio <= self.target else '✗'}"
        times = f"{self.candidate_ms:.2f} | {self.baseline_ms:.2f}"
        return f"| {self.name} | {self.rounds} | {times} | {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f}) | {verdict} |"


HEADER = "| what | rounds | ms | baseline ms | ratio (quartiles) | target |\n| --- | --- | --- | --- | --- | --- |"
MIN_ROUNDS = 7


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """One call, to the end of what it started."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    name: str,
    candidate: Callable[[], object],
    baseline: Callable[[], object],
    device: torch.device,
    budget: float,
    target: float | None = None,
) -> Ratio:
    """
    Time both in each round, first one and then the other, in alternating order.

    Args:
        candidate, baseline (`Callable`): What to call, without arguments.
        budget (`float`): For about how many seconds to time pairs, after one to warm up; at least `MIN_ROUNDS` pairs.
    """
    for function in (candidate, baseline):
        function()
    pair_seconds = seconds(candidate, device) + seconds(baseline, device)
    candidates, baselines = [], []
    for i in range(max(MIN_ROUNDS, int(budget / pair_seconds))):
        pair = [(candidate, candidates), (baseline, baselines)]
        for function, times in pair if i % 2 else pair[::-1]:
            times.append(seconds(function, device))
    ratios = [a / b for a, b in zip(candidates, baselines)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Ratio(
        name,
        len(ratios),
        middle,
        low,
        high,
        1e3 * statistics.median(candidates),
        1e3 * statistics.median(baselines),
        target,
    )


def keep_freed_memory() -> None:
    """
    Have glibc keep what is freed. By default it returns large blocks to the system and faults them in again at the next
    step, a tenth of a step's time that depends on what was allocated before rather than on what is compared.
    """
    if platform.system() == "Linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        for parameter in (m_trim_threshold, m_mmap_threshold):
            libc.mallopt(parameter, 2**30)


def hardware(device: torch.device) -> str:
    """Where the figures are from."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
