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
from .report import BOUNDS, write_report
from .run import is_trained, make_data, measure_bounds, perform

OWN_PRESET = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=OWN_PRESET, help="of this folder, or a YAML file")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="a folder for those of all presets")
    parser.add_argument("--report", type=Path, help="the page; docs/results.md or docs/results_<preset>.md by default")
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument("--workers", type=int, default=workers, help="runs at a time, which share the cores")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"Expected `workers` to be at least 1, but got {args.workers}.")
    plan = load_plan(args.preset)
    results = args.results / plan.name
    report = args.report or Path("docs", "results.md" if plan.name == OWN_PRESET else f"results_{plan.name}.md")
    for run in plan.runs:
        is_finished(plan, run, results)  # before anything is trained
    for name in plan.data:
        make_data(plan, name, results)
        path = results / BOUNDS / f"{name}.json"
        if path.exists():
            remember_settings(path, {"settings": plan.data[name]}, "bounds")
        else:
            write_json(path, measure_bounds(plan, name))
    perform_all(plan, results, args.workers)
    write_report(plan, results, report)


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
        ThreadPoolExecutor(len(plan.runs)) as waiters,
    ):

        def work(run: Run) -> None:
            needed = plan.before(run)
            if needed is not None:
                futures[needed.key].result()  # it was handed out before
            if not is_finished(plan, run, results):
                done = workers.submit(perform, plan, run, num_threads).result()
                write_json(results / f"{run.key}.json", done)
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
    remember_settings(path, {"settings": plan.settings(run)}, f"result {path}")
    needed_by = [other for other in plan.runs if plan.before(other) == run]
    return is_trained(plan, run) or all(is_finished(plan, other, results) for other in needed_by)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
