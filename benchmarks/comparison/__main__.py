"""Train and measure what is missing of a comparison, and report all of it:

python -m benchmarks.comparison --preset cpu

What is finished is kept, run by run, as JSON in `docs/results/<preset>`, and what was interrupted goes on.
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.training.data.shards import remember_settings

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
    The runs that have no result yet, several at a time, in the plan's order as far as what they need is there.

    Raises:
        RuntimeError: if some failed, when all that do not need them are done.
    """
    num_threads = max(1, os.cpu_count() // num_workers)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of the workers, which begin afresh
    waiting = [run for run in plan.runs if not is_finished(plan, run, results)]
    under_way: dict[Future, Run] = {}
    failures: dict[str, BaseException] = {}

    def ready() -> list[Run]:
        missing = {run.key for run in [*waiting, *under_way.values()]} | set(failures)
        return [run for run in waiting if plan.before(run) is None or plan.before(run).key not in missing]

    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        while under_way or ready():
            for run in ready()[: num_workers - len(under_way)]:
                waiting.remove(run)
                under_way[workers.submit(perform, plan, run, num_threads)] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                if future.exception() is not None:
                    failures[run.key] = future.exception()
                else:
                    write_json(results / f"{run.key}.json", future.result())
                    print(f"{run.key}: done", flush=True)
    if failures:
        lines = [f"{key}: {error}" for key, error in failures.items()]
        raise RuntimeError("\n".join(["Expected all runs to succeed, but got", *lines]))


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
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
