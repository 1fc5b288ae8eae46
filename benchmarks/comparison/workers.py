"""Processes that do the jobs of a comparison, each one job after another."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import datasets
import diffusers
import transformers

from benchmarks.watched import end_with

from .plan import Plan
from .run import perform, train
from .schedule import Job

LOG = "worker.log"  # in a run's folder: what sampling and measuring wrote
TERMINATED = 128 + signal.SIGTERM  # exit status


class Worker:
    """
    A process that does the jobs that it is given.

    Args:
        plan ([`Plan`]): Of the jobs.
        num_threads (`int`): Of the process, and of its trainings.
    """

    job: Job | None = None
    started = 0.0  # when it got its job

    def __init__(self, plan: Plan, num_threads: int):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, plan, num_threads, os.getpid())
        self.process = context.Process(target=_work, args=arguments)
        with _new_processes(OMP_NUM_THREADS=str(num_threads)):
            self.process.start()
        theirs.close()  # so that the end of the process ends the connection

    def give(self, job: Job) -> None:
        """Let it do a job; see [`answers`]."""
        self.job, self.started = job, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # a killed process: see `answer`
            self.connection.send(job)

    def answer(self) -> tuple[Job, dict[str, Any] | None, str]:
        """
        Receive the answer of a worker that [`answering`] returned.

        Returns:
            The job; the result, if that is what the job gives; and why the job failed, or an empty text.
        """
        job, self.job = self.job, None
        try:
            return job, *self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return job, None, f"its process ended with {self.process.exitcode}"

    @property
    def is_alive(self) -> bool:
        """Whether it can do another job."""
        return self.process.is_alive()


def answering(workers: list[Worker], deadline: float) -> list[Worker]:
    """Return the workers that have an answer, as soon as one has; none if none has until then (as `time.monotonic` counts)."""
    timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
    ready = wait([worker.connection for worker in workers], timeout)
    return [worker for worker in workers if worker.connection in ready]


def stop(workers: list[Worker], deadline: float) -> None:
    """End the workers and their trainings, which write a checkpoint; those that still are busy at the deadline are killed."""
    for worker in workers:
        worker.job = None
        worker.process.terminate()
    for worker in workers:
        worker.process.join(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def _new_processes(**variables: str) -> Iterator[None]:
    """Start processes with these environment variables, that leave it to this one what Ctrl-C does."""
    before = {name: os.environ.get(name) for name in variables}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a new process inherits
    os.environ.update(variables)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(connection: Connection, plan: Plan, num_threads: int, parent: int) -> None:
    """Do jobs, until this process is told to end, or its parent is gone."""
    signal.signal(signal.SIGTERM, end_in_order)
    end_with(parent)
    hide_progress()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send((_do(plan, job, num_threads), ""))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{' '.join(str(error).split()) or type(error).__name__}"))


def end_in_order(*_: object) -> None:
    """End this process, which waits for its training's last checkpoint, also if it is told a second time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(TERMINATED)


def _do(plan: Plan, job: Job, num_threads: int) -> dict[str, Any] | None:
    """Do one job, whose output goes into a file."""
    run = plan.run(job.key)
    plan.folder(run).mkdir(parents=True, exist_ok=True)
    with open(plan.folder(run) / LOG, "ab") as log:
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return train(plan, run, num_threads) if job.is_training else perform(plan, run, num_threads)


def hide_progress() -> None:
    """Show no progress bars of libraries."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    datasets.disable_progress_bars()
