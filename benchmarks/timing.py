"""Time two ways of doing one thing in turns, so that the computer's other work slows both down equally."""

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
    The result of a comparison.

    Args:
        name (`str`): What is compared with what.
        rounds (`int`): How often both were timed.
        ratio (`float`): The median of the rounds' ratios, `candidate` divided by `baseline`.
        low, high (`float`): The quartiles of the ratios.
        candidate_ms, baseline_ms (`float`): The median times in milliseconds.
        target (`float`, *optional*): The largest ratio that is wanted.
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
        """Return the result as a row of the table that `HEADER` begins."""
        verdict = "" if self.target is None else f"≤ {self.target:.2f} {'✓' if self.ratio <= self.target else '✗'}"
        times = f"{self.candidate_ms:.2f} | {self.baseline_ms:.2f}"
        return f"| {self.name} | {self.rounds} | {times} | {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f}) | {verdict} |"


HEADER = "| what | rounds | ms | baseline ms | ratio (quartiles) | target |\n| --- | --- | --- | --- | --- | --- |"
MIN_ROUNDS = 7


Clock = Callable[[], float]


def seconds(function: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Time one call, including the work that it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(
    name: str,
    candidate: Callable[[], object],
    baseline: Callable[[], object],
    device: torch.device,
    budget: float,
    target: float | None = None,
    clock: Clock = time.perf_counter,
) -> Ratio:
    """
    Time both functions in each round, in alternating order, after calling both once to warm up.

    Args:
        name (`str`): What is compared with what.
        candidate, baseline (`Callable`): The functions, without arguments.
        device (`torch.device`): The device that they compute on.
        budget (`float`): The approximate time for all rounds in seconds; there are at least `MIN_ROUNDS`.
        target (`float`, *optional*): The largest ratio that is wanted.
        clock (`Callable[[], float]`): Of the seconds that are compared.
    """
    for function in (candidate, baseline):
        function()
    pair_seconds = seconds(candidate, device) + seconds(baseline, device)
    candidates, baselines = [], []
    for i in range(max(MIN_ROUNDS, int(budget / pair_seconds))):
        pair = [(candidate, candidates), (baseline, baselines)]
        for function, times in pair if i % 2 else pair[::-1]:
            times.append(seconds(function, device, clock))
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


@dataclass(frozen=True)
class Settings:
    """
    The options of a benchmark. Each benchmark reads those that it depends on.

    Args:
        preset (`str`): The model's size, 'DiT-S/2' and so on, for latents of 32 x 32 pixels with 4 channels.
        device (`torch.device`): The device to compute on.
        dtypes (`list[torch.dtype]`): The dtypes to measure.
        batch_sizes (`list[int]`): The batch sizes to measure, with each dtype.
        compile (`bool`): Whether to compile the models.
        budget (`float`): The time for each comparison, in seconds.
        cpu_time (`bool`): Whether to count the time that processors spent on this process, which other processes hardly lengthen.
    """

    preset: str
    device: torch.device
    dtypes: list[torch.dtype]
    batch_sizes: list[int]
    compile: bool
    budget: float
    cpu_time: bool = False

    def compare(
        self,
        name: str,
        candidate: Callable[[], object],
        baseline: Callable[[], object],
        target: float | None = None,
    ) -> Ratio:
        """Compare two functions on the device and within the budget; see [`compare`]."""
        return compare(name, candidate, baseline, self.device, self.budget, target, self.clock)

    @property
    def clock(self) -> Clock:
        """The clock whose seconds are compared."""
        return time.process_time if self.cpu_time else time.perf_counter

    def name_of(self, dtype: torch.dtype) -> str:
        """Return the name of a dtype for a table, with 'compiled' if the models are."""
        return str(dtype).removeprefix("torch.") + (" compiled" if self.compile else "")


def keep_freed_memory() -> None:
    """
    Have glibc keep freed memory for later allocations.

    By default it returns large blocks to the system, and the next step waits for new ones: a tenth of its time, which depends
    on earlier allocations and not on what is compared.
    """
    if platform.system() == "Linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        for parameter in (m_trim_threshold, m_mmap_threshold):
            libc.mallopt(parameter, 2**30)


def hardware(device: torch.device) -> str:
    """Name the processor, the number of threads and the version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
