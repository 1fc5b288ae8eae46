"""Time two ways of doing one thing in turns, so that the computer's other work slows both down equally."""

import ctypes
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffusers_dmp.training.utilisation import synchronise

ROOT = Path(__file__).parent.parent  # of the repository


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

    @classmethod
    def of(
        cls, name: str, candidates: Sequence[float], baselines: Sequence[float], target: float | None = None
    ) -> "Ratio":
        """Make the result of the rounds' times, in seconds."""
        ratios = [a / b for a, b in zip(candidates, baselines)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = (1e3 * statistics.median(times) for times in (candidates, baselines))
        return cls(name, len(ratios), middle, low, high, *medians, target)

    def row(self) -> str:
        """Return the result as a row of the table that `HEADER` begins."""
        verdict = "" if self.target is None else f"≤ {self.target:.2f} {'✓' if self.ratio <= self.target else '✗'}"
        times = f"{self.candidate_ms:.2f} | {self.baseline_ms:.2f}"
        return f"| {self.name} | {self.rounds} | {times} | {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f}) | {verdict} |"


HEADER = "| what | rounds | ms | baseline ms | ratio (quartiles) | target |\n| --- | --- | --- | --- | --- | --- |"
MIN_ROUNDS = 7
# On a GPU: the first call compiles, the second warms up what a CUDA graph needs, the third captures the graph.
GPU_WARM_UPS = 3
# and so many seconds of calls between two waits, next to which the wait itself, some 20 µs, is nothing
GPU_SECONDS_BETWEEN_WAITS = 0.1


Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)


def seconds(
    function: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter, calls: int = 1
) -> float:
    """Time a call, including the work that it started on the device: the mean of some that follow one another without waiting."""
    synchronise(device)
    start = clock()
    for _ in range(calls):
        function()
    synchronise(device)
    return (clock() - start) / calls


def time_in_turns(
    functions: dict[Name, Callable[[], object]],
    device: torch.device,
    budget: float,
    clock: Clock = time.perf_counter,
) -> dict[Name, list[float]]:
    """
    Time all functions in each round, forwards and backwards in turns, after warming up, which is when they compile.

    Args:
        functions (`dict[Name, Callable]`): The functions, without arguments.
        device (`torch.device`): The device that they compute on.
        budget (`float`): The approximate time for all rounds in seconds; there are at least `MIN_ROUNDS`.
        clock (`Callable[[], float]`): Of the seconds.

    Returns:
        `dict[Name, list[float]]`: The seconds of a call of each function in each round.
    """
    is_gpu = device.type == "cuda"
    for function in functions.values():
        for _ in range(GPU_WARM_UPS if is_gpu else 1):
            function()
    once = {name: seconds(function, device) for name, function in functions.items()}
    calls = {name: math.ceil(GPU_SECONDS_BETWEEN_WAITS / once[name]) if is_gpu else 1 for name in functions}
    round_seconds = sum(once[name] * calls[name] for name in functions)
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for i in range(max(MIN_ROUNDS, int(budget / round_seconds))):
        for name in functions if i % 2 else reversed(functions):
            times[name].append(seconds(functions[name], device, clock, calls[name]))
    return times


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
    Time both functions in each round, in alternating order; see [`time_in_turns`].

    Args:
        name (`str`): What is compared with what.
        candidate, baseline (`Callable`): The functions, without arguments.
        device (`torch.device`): The device that they compute on.
        budget (`float`): The approximate time for all rounds in seconds; there are at least `MIN_ROUNDS`.
        target (`float`, *optional*): The largest ratio that is wanted.
        clock (`Callable[[], float]`): Of the seconds that are compared.
    """
    times = time_in_turns({"candidate": candidate, "baseline": baseline}, device, budget, clock)
    return Ratio.of(name, times["candidate"], times["baseline"], target)


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
        parts (`Sequence[str]`): Of a benchmark's `PARTS`, those to measure.
        results (`Path`, *optional*): A file of what was measured, to go on with.
    """

    preset: str
    device: torch.device
    dtypes: list[torch.dtype]
    batch_sizes: list[int]
    compile: bool
    budget: float
    cpu_time: bool = False
    parts: Sequence[str] = ()
    results: Path | None = None

    def compiled(self, model: Any) -> Any:
        """Return a model, which is compiled if the models are: for each shape by itself, whichever came before."""
        if self.compile:
            model.compile(dynamic=False)
        return model

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
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def commit(paths: Sequence[str] = ()) -> str:
    """
    Name the commit that is measured, with '-dirty' if files were changed since; 'unknown' outside of a repository.

    Args:
        paths (`Sequence[str]`): Name the last commit that changed these instead, as Git's pathspecs from the repository's root.
    """
    try:
        if not paths:
            return _git("describe", "--always", "--dirty", "--exclude=*")
        found = _git("log", "-1", "--first-parent", "--format=%h", "--", *paths)  # a merge that changed them counts
        return f"{found}-dirty" if _git("diff", "--name-only", "HEAD", "--", *paths) else found
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    """Return what Git answers."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def allow_more_shapes() -> None:
    """
    Let PyTorch compile as many variants of one function as a benchmark has cases.

    By default it runs what has more than eight without compiling it: models of one class share the function that is compiled, so
    that each model, batch size and dtype counts.
    """
    torch._dynamo.config.recompile_limit = 64
