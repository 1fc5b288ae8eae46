"""In which order the runs of a comparison are done, and how long what is left will take."""

import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .plan import Plan, Run


class Job(NamedTuple):
    """
    A part of a run that one process does: the training, for which other runs may wait, or the rest, which gives its result.

    Args:
        key (`str`): Of the run.
        is_training (`bool`): Which part.
    """

    key: str
    is_training: bool


class Schedule:
    """
    What is left of a comparison, in the order in which it is to be done.

    A job is ready when what it needs is done: measuring needs its own run's training, and if others' pipelines sample or guide,
    those of the runs before it. Whatever is ready may be started, so that no process waits as long as something is: seed by seed; what a long
    chain of other runs waits for comes first; and a run that is trained is measured before another one is begun.

    Args:
        plan ([`Plan`]): All runs.
        finished (`Iterable[str]`): Keys of the runs that have a result.
        trained (`Iterable[str]`): Keys of the runs whose training is complete.
        only (`Sequence[str]`): The comparisons whose results are wanted; all by default. Others' runs that they need are
            trained.

    Raises:
        ValueError: if there is no such comparison.
    """

    def __init__(self, plan: Plan, finished: Iterable[str], trained: Iterable[str], only: Sequence[str] = ()):
        names = [comparison.name for comparison in plan.comparisons]
        unknown = [name for name in only if name not in names]
        if unknown:
            raise ValueError(f"Expected `only` to be some of {', '.join(names)}, but got {unknown[0]!r}.")
        self.runs = {run.key: run for run in plan.runs}
        self._before = {run.key: [needed.key for needed in plan.before(run)] for run in plan.runs}
        self._trained = set(trained)
        chosen = [run.key for run in plan.runs if not only or run.comparison in only]
        self.num_runs = len(chosen)
        self.unfinished = [key for key in chosen if key not in set(finished)]
        self.missing: set[Job] = set()  # jobs that are not done
        for key in self.unfinished:
            self.missing.add(Job(key, is_training=False))
            self._require(key)
            if self.runs[key].uses_others:
                for needed in self._before[key]:
                    self._require(needed)
        self.needs = {job: self._needs(job) for job in self.missing}
        ranks = {key: rank for rank, key in enumerate(self.runs)}
        followers = self._followers()
        self.left = sorted(
            self.missing,
            key=lambda job: (self.runs[job.key].seed, -followers[job], job.is_training, ranks[job.key]),
        )
        self.failures: dict[str, str] = {}

    def _require(self, key: str) -> None:
        """Note that a run's output is needed: its training, or if it has none, those of the runs before it."""
        if self.runs[key].script:
            if key in self._trained or Job(key, is_training=True) in self.missing:
                return
            self.missing.add(Job(key, is_training=True))
        for needed in self._before[key]:
            self._require(needed)

    def _needs(self, job: Job) -> list[Job]:
        """Return the jobs that must be done before one."""
        run = self.runs[job.key]
        own = [Job(job.key, is_training=True)] if run.script and not job.is_training else []
        others = self._before[job.key] if job.is_training or run.uses_others else []
        return own + [other for key in others for other in self._outputs(key)]

    def _outputs(self, key: str) -> list[Job]:
        """Return the jobs after which a run's output is there."""
        if self.runs[key].script:
            return [Job(key, is_training=True)]
        return [job for needed in self._before[key] for job in self._outputs(needed)]

    def _followers(self) -> dict[Job, int]:
        """Return how many runs one after another wait for each job; its own run's measuring does not count."""
        waiting: dict[Job, list[Job]] = {job: [] for job in self.missing}
        for job in self.missing:
            for needed in self.needs[job]:
                if needed in waiting and needed.key != job.key:
                    waiting[needed].append(job)
        lengths: dict[Job, int] = {}

        def length(job: Job) -> int:
            if job not in lengths:
                lengths[job] = max((1 + length(other) for other in waiting[job]), default=0)
            return lengths[job]

        return {job: length(job) for job in self.missing}

    def ready(self) -> list[Job]:
        """Return the jobs that can be started now, in their order."""
        return [job for job in self.left if not self.missing.intersection(self.needs[job])]

    def start(self, job: Job) -> None:
        """Note that a job is being done."""
        self.left.remove(job)

    def finish(self, job: Job) -> None:
        """Note that a job is done."""
        self.missing.remove(job)
        if not job.is_training:
            self.unfinished.remove(job.key)

    def fail(self, job: Job, reason: str) -> None:
        """Note that a job failed: what needs it is never ready."""
        self.failures[job.key] = reason


@dataclass
class Durations:
    """
    How long runs take, estimated from those that are finished.

    Args:
        known (`list[tuple[Run, float]]`): Finished runs, with their seconds.
    """

    known: list[tuple[Run, float]] = field(default_factory=list)

    def of(self, run: Run) -> float | None:
        """
        Estimate the seconds of a run: the mean of its kind, else of its script, in proportion to the steps, else of all.

        Returns:
            None if no run is finished.
        """
        same_kind = [seconds for other, seconds in self.known if kind(other) == kind(run)]
        same_script = [
            seconds * num_steps(run) / num_steps(other) for other, seconds in self.known if other.script == run.script
        ]
        seconds = same_kind or same_script or [seconds for _, seconds in self.known]
        return statistics.mean(seconds) if seconds else None

    def rest_of(self, run: Run, spent: float) -> float | None:
        """Estimate the seconds of what is left of a run, into which `spent` seconds went: at least a tenth of it."""
        whole = self.of(run)
        return None if whole is None else max(whole - spent, whole / 10)

    def left(self, schedule: Schedule, spent: dict[str, float], num_workers: int) -> float | None:
        """
        Estimate the seconds until everything is done.

        Args:
            schedule ([`Schedule`]): What is left.
            spent (`dict[str, float]`): The seconds that went into unfinished runs, by key.
            num_workers (`int`): How many jobs are done at a time.
        """
        keys = {job.key for job in schedule.missing}  # also of finished runs, whose output is gone and needed
        rests = [self.rest_of(schedule.runs[key], spent.get(key, 0.0)) for key in keys]
        known = [rest for rest in rests if rest is not None]
        return sum(known) / num_workers if len(known) == len(rests) else None


def kind(run: Run) -> Hashable:
    """What runs that take equally long have in common."""
    names = ("config", "max_train_steps", "num_experts", "num_images", "patch_size")
    sizes = tuple(run.arguments.get(name) for name in names)
    return run.script, sizes, run.measured, bool(run.guide), len(run.parts)


def num_steps(run: Run) -> int:
    """Return how many steps a run is trained, or 1 if it is not."""
    return run.arguments.get("max_train_steps", 1)


def time_text(seconds: float) -> str:
    """Format a time, such as '50 s', '5 min 50 s' or '3 h 10 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"
