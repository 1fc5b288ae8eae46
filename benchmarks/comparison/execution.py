"""Do the jobs of a schedule with several processes at once, until all are done or the time is over."""

import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scripts import seconds_spent
from diffusers_dmp.saving.whole import write_json, written_whole
from diffusers_dmp.training.launching import num_cores

from .plan import Plan
from .run import GRID
from .schedule import Durations, Job, Schedule, time_text
from .workers import Worker, answering, stop

FOREVER = float("inf")
SECONDS_TO_BEGIN = 30.0  # about what a training takes until its first step
SECONDS_AT_THE_END = 20.0  # for the last checkpoints, and as many for the report, of a part that is long enough


@dataclass(frozen=True)
class Limits:
    """
    When a part of the comparison ends, as `time.monotonic` counts.

    Args:
        started (`float`): When it began.
        stop_at (`float`): When what is trained then is interrupted.
        kill_at (`float`): When what has not ended by itself is killed.
    """

    started: float
    stop_at: float = FOREVER
    kill_at: float = FOREVER

    @classmethod
    def of(cls, started: float, minutes: float | None) -> "Limits":
        """Leave time for the last checkpoints, and for the report."""
        if minutes is None:
            return cls(started)
        end = started + 60 * minutes
        reserve = min(SECONDS_AT_THE_END, 60 * minutes / 5)
        return cls(started, end - 2 * reserve, end - reserve)

    def allow(self, job: Job, estimate: float | None, now: float) -> bool:
        """
        Return whether a job should be started.

        A training is worth it with less time than it needs, because the next part goes on with it. The rest of a run is not,
        unless no part is long enough for it, which begins with the imports.

        Args:
            job ([`Job`]): Which.
            estimate (`float`, *optional*): Its seconds; None if nothing is known.
            now (`float`): As `time.monotonic` counts.
        """
        left, part = self.stop_at - now, self.stop_at - self.started
        if job.is_training:
            return left >= min(SECONDS_TO_BEGIN, part / 2)
        return left > 0 and (estimate is None or estimate <= left or estimate > part - SECONDS_TO_BEGIN)


@dataclass
class Execution:
    """
    The work on a comparison.

    Args:
        plan ([`Plan`]): All runs.
        results (`Path`): The folder of the plan's results.
        schedule ([`Schedule`]): What is left.
        durations ([`Durations`]): What is known of how long runs take.
        num_workers (`int`): How many jobs are done at a time; they share the cores.
        limits ([`Limits`]): When it ends.
    """

    plan: Plan
    results: Path
    schedule: Schedule
    durations: Durations
    num_workers: int
    limits: Limits
    workers: list[Worker] = field(default_factory=list, init=False)

    def perform(self) -> None:
        """Do what is left; failures are noted in the schedule, and what does not need them is done."""
        try:
            while True:
                self._start_ready()
                busy = [worker for worker in self.workers if worker.job is not None]
                answered = answering(busy, self.limits.stop_at) if busy else []
                if not answered:  # nothing is left that can be done, or the time is over
                    break
                for worker in answered:
                    self._note(*worker.answer())
        finally:
            stop(self.workers, self.limits.kill_at)

    def _start_ready(self) -> None:
        """Give a job to each worker that has none, as long as jobs are ready."""
        for job in self.schedule.ready():
            if not self.limits.allow(job, self._estimate(job), time.monotonic()):
                continue
            # one that died with a job still has to answer for it
            self.workers = [worker for worker in self.workers if worker.is_alive or worker.job is not None]
            idle = [worker for worker in self.workers if worker.job is None]
            if not idle and len(self.workers) == self.num_workers:
                break
            if not idle:
                idle = [Worker(self.plan, max(1, num_cores() // self.num_workers))]
                self.workers += idle
            idle[0].give(job)
            self.schedule.start(job)

    def _estimate(self, job: Job) -> float | None:
        """Estimate the seconds of what is left of a job's run."""
        return self.durations.rest_of(self.schedule.runs[job.key], self._spent(job.key))

    def _spent(self, key: str) -> float:
        """Return the seconds that went into a run, in all parts and until now."""
        now = time.monotonic()
        own = [now - worker.started for worker in self.workers if worker.job is not None and worker.job.key == key]
        return seconds_spent(self.plan.folder(self.schedule.runs[key])) + sum(own)

    def _note(self, job: Job, result: dict[str, Any] | None, failure: str) -> None:
        """Write the result of a job, and say what is left."""
        if failure:
            self.schedule.fail(job, failure)
            print(f"{job.key}: failed, {failure}", file=sys.stderr, flush=True)
            return
        run = self.schedule.runs[job.key]
        if result is not None:
            _keep_grid(self.plan, job.key, self.results)
            write_json(self.results / f"{job.key}.json", result)
            self.durations.known.append((run, result["seconds"]))
        self.schedule.finish(job)
        if result is not None:
            fid = f", FID {result['points'][-1]['FID']:.2f}" if "points" in result else ""
            print(f"{job.key}: done in {time_text(result['seconds'])}{fid}; {self.left()}", flush=True)

    def left(self) -> str:
        """Say how many runs are left, and how long they will take."""
        number, of = len(self.schedule.unfinished), self.schedule.num_runs
        if not number:
            return f"all {of} runs are done"
        spent = {job.key: self._spent(job.key) for job in self.schedule.missing}
        seconds = self.durations.left(self.schedule, spent, self.num_workers)
        return f"{number} of {of} runs left, {'no estimate yet' if seconds is None else f'about {time_text(seconds)}'}"


def _keep_grid(plan: Plan, key: str, results: Path) -> None:
    """Copy the images of the first seed to the results."""
    run = plan.run(key)
    if run.measured and run.seed == plan.seeds[0]:
        with written_whole(results / f"{key}.png") as unfinished:
            shutil.copy(plan.folder(run) / GRID, unfinished)
