"""Train and measure the runs of a comparison that have no result yet, and write the report of all results:

python -m benchmarks.comparison --preset cpu

The result of each finished run is a JSON file in `docs/results/<preset>`. An interrupted run continues.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.data.shards import remember_settings

from .data import make_data
from .measure import measure_bounds
from .plan import Plan, Run, load_plan
from .report import BOUNDS, write_report
from .run import GRID, is_trained, perform

OWN_PRESET = "cpu"


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=OWN_PRESET, help="a preset of this folder, or a YAML file")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), help="the folder of all presets' results"
    )
    parser.add_argument(
        "--report", type=Path, help="the page to write; docs/results.md or docs/results_<preset>.md by default"
    )
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument("--workers", type=int, default=workers, help="how many runs at a time; they share the cores")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"Expected `workers` to be at least 1, but got {args.workers}.")
    plan = load_plan(args.preset)
    results = args.results / plan.name
    report = args.report or Path("docs", "results.md" if plan.name == OWN_PRESET else f"results_{plan.name}.md")
    for run in plan.runs:
        is_finished(plan, run, results)  # raises for other settings, before anything is trained
    for name in plan.data:
        make_data(plan, name, args.results)
        path = results / BOUNDS / f"{name}.json"
        if path.exists():
            remember_settings(path, {"settings": plan.data[name]}, "bounds")
        else:
            write_json(path, measure_bounds(plan, name))
    perform_all(plan, results, args.workers)
    write_report(plan, results, report)


def perform_all(plan: Plan, results: Path, num_workers: int) -> None:
    """
    Do the runs that have no result yet, several at a time, in the plan's order; a run waits for the run that it needs.

    Args:
        plan ([`Plan`]): All runs.
        results (`Path`): The folder of the plan's results.
        num_workers (`int`): How many runs at a time.

    Raises:
        RuntimeError: if some runs failed, after all runs that do not need them are done.
    """
    num_threads = max(1, os.cpu_count() // num_workers)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read by the workers, which are new processes
    waiting = [run for run in plan.runs if not is_finished(plan, run, results)]
    running: dict[Future, Run] = {}
    failures: dict[str, BaseException] = {}

    def ready() -> list[Run]:
        missing = {run.key for run in [*waiting, *running.values()]} | set(failures)
        return [run for run in waiting if not missing & {needed.key for needed in plan.before(run)}]

    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        while running or ready():
            for run in ready()[: num_workers - len(running)]:
                waiting.remove(run)
                running[workers.submit(perform, plan, run, num_threads)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if future.exception() is not None:
                    failures[run.key] = future.exception()
                else:
                    keep_grid(plan, run, results)
                    write_json(results / f"{run.key}.json", future.result())
                    print(f"{run.key}: done", flush=True)
    if failures:
        lines = [f"{key}: {error}" for key, error in failures.items()]
        raise RuntimeError("\n".join(["Expected all runs to succeed, but got", *lines]))


def keep_grid(plan: Plan, run: Run, results: Path) -> None:
    """Copy the images of the first seed to the results."""
    grid = plan.folder(run) / GRID
    if run.measured and run.seed == plan.seeds[0]:
        with written_whole(results / f"{run.key}.png") as unfinished:
            shutil.copy(grid, unfinished)


def is_finished(plan: Plan, run: Run, results: Path) -> bool:
    """
    Return whether a run needs no more work.

    It has a result; and if an unfinished run needs the trained weights of this one, they are there, too.

    Args:
        plan ([`Plan`]), run ([`Run`]): Which run.
        results (`Path`): The folder of the plan's results.

    Raises:
        ValueError: if the result is of a run with other settings.
    """
    path = results / f"{run.key}.json"
    if not path.exists():
        return False
    remember_settings(path, {"settings": plan.settings(run)}, f"result {path}")
    needed_by = [other for other in plan.runs if run in plan.before(other)]
    return is_trained(plan, run) or all(is_finished(plan, other, results) for other in needed_by)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, which is never left incomplete."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main, name="benchmarks.comparison")
