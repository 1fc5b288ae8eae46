"""Train and measure the runs of a comparison that have no result yet, and write the report of all results:

python -m benchmarks.comparison --preset cpu

The result of each finished run is a JSON file in `docs/results/<preset>`. After an interruption, however it came about, the same
command goes on, with trainings from their last checkpoint.
"""

import argparse
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil
import torch

from benchmarks.scripts import only_one
from diffusers_dmp.evaluation.features import INCEPTION
from diffusers_dmp.saving.whole import write_json
from diffusers_dmp.terminal import INTERRUPTED, OneLineParser, run_command, write_line
from diffusers_dmp.training.launching import num_cores

from .checks import begun_work, expect_commits, expect_extractor, expect_inception, stored_results
from .data import make_data
from .execution import Execution, Limits
from .measure import measure_bounds
from .plan import Plan, load_plan
from .report import write_report
from .results import BOUNDS, INCEPTION_FINGERPRINT, read_bounds
from .run import is_trained
from .schedule import Durations, Schedule
from .workers import hide_progress

OWN_PRESET = "cpu"
BOUNDS_LOG = "bounds.log"  # in a data set's folder
GPU_WORKERS = 4  # small trainings wait for the CPU more than for the GPU


def main(argv: list[str]) -> None:
    started = time.monotonic() - (time.time() - psutil.Process().create_time())  # before the imports
    args = parse(argv)
    hide_progress()
    plan = replace(load_plan(args.preset), inception=args.inception)
    results = args.results / plan.name
    report = args.report or Path("docs", "results.md" if plan.name == OWN_PRESET else f"results_{plan.name}.md")
    stored = stored_results(plan, results)
    finished = {f"{path.parent.name}/{path.stem}": result for path, result in stored.items()}
    schedule = Schedule(plan, finished, [run.key for run in plan.runs if is_trained(plan, run)], args.only)
    durations = Durations([(run, finished[run.key]["seconds"]) for run in plan.runs if run.key in finished])
    execution = Execution(plan, results, schedule, durations, args.workers, Limits.of(started, args.minutes))
    if schedule.left and args.minutes != 0:
        expect_commits(stored | begun_work(plan), args.accept_commits)
        with only_one(plan.output_dir, "comparison"), one_line_after_an_interruption(execution):
            expect_extractor(plan, stored, args.results)
            expect_inception(plan, stored)
            prepare(plan, args.results, schedule)
            execution.perform()
    write_report(plan, results, report)
    print(f"{report} is written; {execution.left()}")
    if schedule.failures:
        write_line(
            f"Expected all runs to succeed, but {len(schedule.failures)} failed: {', '.join(schedule.failures)}."
        )
        raise SystemExit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Parse the command line.

    Raises:
        ValueError: if an option is unknown, or a number is out of range.
    """
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=OWN_PRESET, help="a preset of this folder, or a YAML file")
    parser.add_argument(
        "--minutes", type=float, help="end after so many, to go on later; with 0, only write the report"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="COMPARISON", help="whose runs are wanted; by default all"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), help="the folder of all presets' results"
    )
    parser.add_argument(
        "--report", type=Path, help="the page to write; docs/results.md or docs/results_<preset>.md by default"
    )
    parser.add_argument(
        "--workers", type=int, default=GPU_WORKERS if torch.cuda.is_available() else num_cores(),
        help=f"how many runs at a time, which share the cores; by default {GPU_WORKERS} on a GPU, else one per core",
    )  # fmt: skip
    parser.add_argument(
        "--accept_commits", nargs="+", default=[], metavar="COMMIT",
        help="go on with results of these commits: nothing that the figures depend on has changed since",
    )  # fmt: skip
    parser.add_argument(
        "--inception", nargs="?", const=INCEPTION, default="", metavar="FILE",
        help="measure FID by Inception, too, at the end of each run: its weights are downloaded, or read from this file",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"Expected `workers` to be at least 1, but got {args.workers}.")
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(f"Expected `minutes` to be at least 0, but got {args.minutes}.")
    return args


def prepare(plan: Plan, results: Path, schedule: Schedule) -> None:
    """Make the data sets that what is left needs, and measure their bounds, unless that is done."""
    for name in sorted({schedule.runs[job.key].data for job in schedule.left}):
        make_data(plan, name, results)
        path = results / plan.name / BOUNDS / f"{name}.json"
        if not path.exists() or plan.inception and INCEPTION_FINGERPRINT not in read_bounds(path)["real"]:
            # as of workers, what measuring says of each file that it reads goes to a log
            with open(plan.data_folder(name) / BOUNDS_LOG, "a") as log, redirect_stderr(log):
                write_json(path, measure_bounds(plan, name))


@contextmanager
def one_line_after_an_interruption(execution: Execution) -> Iterator[None]:
    """Say after Ctrl-C or SIGTERM how to go on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        write_line(f"benchmarks.comparison: interrupted; the same command goes on: {execution.left()}")
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    run_command(main, name="benchmarks.comparison")
