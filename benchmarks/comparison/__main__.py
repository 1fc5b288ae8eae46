"""Train and measure what is missing of a comparison, and report all of it:

python -m benchmarks.comparison --preset cpu

What is finished is kept, run by run, as JSON in `docs/results/<preset>`, and what was interrupted goes on.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import torch

from diffusers_dmp.training.shards import remember_settings

from .plan import Plan, Run, load_plan
from .report import write_report
from .run import make_data, measure_bounds, perform

BOUNDS = "bounds"  # the folder of what real images and noise come to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu", help="of this folder, or a YAML file")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument("--workers", type=int, default=workers, help="runs at a time, which share the cores")
    args = parser.parse_args()
    plan = load_plan(args.preset)
    results = args.results / plan.name
    for name in plan.data:
        make_data(plan, name)
        path = results / BOUNDS / f"{name}.json"
        if not path.exists():
            write_json(path, measure_bounds(plan, name))
    perform_all(plan, results, args.workers)
    write_report(plan, results, args.report)


def perform_all(plan: Plan, results: Path, num_workers: int) -> None:
    """
    The runs that have no result yet, several at a time, each after that which it needs.

    Raises:
        RuntimeError: if some failed, when all others are done.
    """
    num_threads = max(1, os.cpu_count() // num_workers)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of the workers, which begin afresh
    futures: dict[str, Future] = {}
    with (
        ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers,
        ThreadPoolExecutor(num_workers) as waiters,
    ):

        def work(run: Run) -> None:
            needed = plan.before(run)
            if needed is not None:
                futures[needed.key].result()  # it was handed out before
            if not is_finished(plan, run, results):
                print(f"{run.key}: begun", flush=True)
                write_json(results / f"{run.key}.json", workers.submit(perform, plan, run, num_threads).result())
                print(f"{run.key}: done", flush=True)

        for run in plan.runs:
            futures[run.key] = waiters.submit(work, run)
    failures = [f"{key}: {future.exception()}" for key, future in futures.items() if future.exception() is not None]
    if failures:
        raise RuntimeError("Expected all runs to succeed, but got\n" + "\n".join(failures))


def is_finished(plan: Plan, run: Run, results: Path) -> bool:
    """
    Whether there is a result, and, if others need what it trained and have none, that too.

    Raises:
        ValueError: if the result is of a run with other settings.
    """
    path = results / f"{run.key}.json"
    if not path.exists():
        return False
    remember_settings(path, {"settings": plan.settings(run)}, "result")
    needed_by = [other for other in plan.runs if plan.before(other) == run]
    return plan.folder(run).exists() or all(is_finished(plan, other, results) for other in needed_by)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
