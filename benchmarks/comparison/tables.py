"""The figures of a comparison's page, computed from the results' JSON files: rows, differences, and what is missing."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_dmp.evaluation.fingerprint import expect_comparable

from .plan import Comparison, Plan, Run
from .results import BOUNDS, BY_INCEPTION, INCEPTION_FINGERPRINT, read_bounds, read_result

LOWER_IS_BETTER = ("FID", "KID", BY_INCEPTION)
# entries of a fingerprint that only sampled images have; and of a small data set there are fewer real images than sampled ones
SAMPLING = ("num_inference_steps", "scheduler", "scheduler_sha256", "vae_sha256", "guidance_scale", "guidance_channels",
            "pipeline_arguments", "dtype", "tf32", "prompts_sha256", "num_samples")  # fmt: skip
FLAT = 0.05  # FID changes by less over the last quarter of a training that has converged


@dataclass(frozen=True)
class Row:
    """
    One row of a table: a run with all its seeds.

    Args:
        runs (`list[Run]`): One for each seed.
        results (`dict[int, dict]`): The results by seed, of those that are finished.
        grid (`Path`, *optional*): The images of the first seed.
    """

    runs: list[Run]
    results: dict[int, dict[str, Any]]
    grid: Path | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return self.runs[0].name

    @property
    def title(self) -> str:
        """The run's title."""
        return self.runs[0].title

    @property
    def scale(self) -> float | None:
        """The scale of a guide."""
        return self.runs[0].sampling.get("scale")

    def values(self, name: str) -> list[float]:
        """Return an entry of the results, or a metric at the end of training; one value for each seed that has one."""
        found = (
            result[name] if name in result else result["points"][-1].get(name) for result in self.results.values()
        )
        return [value for value in found if value is not None]

    def curve(self) -> dict[int, list[float]]:
        """Return FID by training step, one value per seed."""
        curve: dict[int, list[float]] = {}
        for result in self.results.values():
            for point in result["points"]:
                curve.setdefault(point["step"], []).append(point["FID"])
        return dict(sorted(curve.items()))

    def convergence(self) -> dict[str, Any] | None:
        """Return mean FID after three quarters of the training and at its end, if it is measured at several steps."""
        curve = {step: statistics.mean(fids) for step, fids in self.curve().items()}
        last = max(curve)
        before = max((step for step in curve if step <= 0.75 * last), default=None)
        if before is None:
            return None
        change = curve[last] / curve[before] - 1
        ends = {"before": before, "FID_before": curve[before], "last": last, "FID_last": curve[last]}
        return ends | {"change": change, "is_flat": abs(change) < FLAT}

    def pairs(self, baseline: "Row") -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the results together with the baseline's, for each seed with which both were sampled from the same noise."""
        both = [(self.results[seed], baseline.results[seed]) for seed in self.results if seed in baseline.results]
        return [(own, other) for own, other in both if noise_of(own) == noise_of(other)]


def noise_of(result: dict[str, Any]) -> tuple[str | None, ...]:
    """Return what decides the noise beside the seed: devices have different random numbers."""
    return tuple(result["fingerprint"].get(name) for name in ("device", "noise"))


@dataclass(frozen=True)
class Table:
    """
    The results of a comparison.

    Args:
        comparison ([`Comparison`]): The comparison.
        rows (`list[Row]`): The measured runs that have results.
        missing (`list[Run]`): All runs that have none.
        trained_again (`list[str]`): What results started from that is trained again: others started from another training.
    """

    comparison: Comparison
    rows: list[Row]
    missing: list[Run]
    trained_again: list[str]

    def baseline_of(self, row: Row) -> Row | None:
        """Return what a row is compared with, if it has a result with a seed of the row's."""
        name = self.comparison.baseline_of(row.name)
        return next(
            (other for other in self.rows if other.name == name and row is not other and row.pairs(other)), None
        )

    @property
    def compared(self) -> list[Row]:
        """The rows that are compared with a baseline."""
        return [row for row in self.rows if self.baseline_of(row)]

    def label(self, row: Row) -> str:
        """Return a row's title, and what it is compared with if that is not the table's baseline."""
        baseline = self.baseline_of(row)
        other = baseline and baseline.name != self.comparison.baseline
        return f"{row.title} (against “{baseline.title}”)" if baseline and other else row.title

    def differences(self, row: Row, metric: str) -> list[float]:
        """Return how much higher a metric is at the end of training than the baseline's, seed by seed."""
        baseline = self.baseline_of(row)
        ends = [[each["points"][-1].get(metric) for each in pair] for pair in row.pairs(baseline)] if baseline else []
        return [own - other for own, other in ends if own is not None and other is not None]

    def loss_changes(self, row: Row) -> list[list[float]]:
        """Return by how many percent the losses differ from the baseline's: for each band of timesteps, one value per seed."""
        baseline = self.baseline_of(row)
        losses = [(one["losses"], two["losses"]) for one, two in row.pairs(baseline)] if baseline else []
        changes = [[100 * (own / other - 1) for own, other in zip(*pair)] for pair in losses if None not in pair]
        return [list(band) for band in zip(*changes)]

    @property
    def curves(self) -> list[Row]:
        """The rows whose images are measured at several steps."""
        return [row for row in self.rows if len(row.curve()) > 1]

    @property
    def with_losses(self) -> list[Row]:
        """The rows whose losses can be compared with a baseline's."""
        return [row for row in self.rows if self.loss_changes(row)]

    @property
    def noises(self) -> dict[tuple[str | None, ...], list[Row]]:
        """The rows that have images, by the noise that these were sampled from."""
        noises: dict[tuple[str | None, ...], list[Row]] = {}
        for row in (row for row in self.rows if row.grid):
            noises.setdefault(noise_of(row.results[row.runs[0].seed]), []).append(row)
        return noises

    def verdicts(self) -> dict[str, list[Row]]:
        """Return the rows whose FID is lower than the baseline's with every seed that both have, with some, with none; of several."""
        every, some, none = "every seed that both have", "some seeds only", "no seed"
        verdicts: dict[str, list[Row]] = {every: [], some: [], none: []}
        for row in self.compared:
            differences = self.differences(row, "FID")
            better = num_better("FID", differences)
            if len(differences) > 1:
                verdicts[every if better == len(differences) else some if better else none].append(row)
        return {seeds: rows for seeds, rows in verdicts.items() if rows}


def num_better(metric: str, differences: list[float]) -> int:
    """Count the seeds for which a metric is better than the baseline's."""
    return sum(each < 0 if metric in LOWER_IS_BETTER else each > 0 for each in differences)


def read_tables(plan: Plan, results: Path) -> list[Table]:
    """
    Read the results of all finished runs, comparison by comparison.

    Raises:
        ValueError: if a result is not complete, or results of one table were not measured in the same way.
    """
    bounds = read_all_bounds(plan, results)
    found: dict[str, dict[str, Any]] = {}
    hashes: dict[str, set[str]] = {}  # of weights, by their places
    for run in plan.runs:
        path = results / f"{run.key}.json"
        if path.exists():
            found[run.key] = read_result(path, run.measured)
            for place, sha256 in _weights(plan, run, found[run.key]).items():
                hashes.setdefault(place, set()).add(sha256)
    trained_again = {place for place, some in hashes.items() if len(some) > 1}
    tables = []
    for comparison in plan.comparisons:
        rows = []
        for runs in comparison.measured.values():
            own = {run.seed: found[run.key] for run in runs if run.key in found}
            grid = results / f"{runs[0].key}.png"
            if own:
                rows.append(Row(runs, own, grid if grid.exists() and runs[0].seed in own else None))
        finished = [run for run in comparison.runs if run.key in found]
        used = {place for run in finished for place in _weights(plan, run, found[run.key])}
        missing = [run for run in comparison.runs if run not in finished]
        table = Table(comparison, rows, missing, sorted(trained_again & used))
        _expect_measured_alike(table, bounds, results)
        tables.append(table)
    return tables


def _weights(plan: Plan, run: Run, result: dict[str, Any]) -> dict[str, str]:
    """Return hashes of the weights that a run started from, and of those that its images were sampled with, by their places."""
    place = plan.place(run, run.base) if run.base else plan.folder(run) / "pipeline"
    sampled_with = result.get("fingerprint", {}).get("pipeline_sha256")
    own = {place.relative_to(plan.output_dir).as_posix(): sampled_with} if sampled_with else {}
    return own | result.get("started_from", {})


def read_all_bounds(plan: Plan, results: Path) -> dict[str, dict[str, Any]]:
    """Read the metrics of real images and of noise, by data set, as far as they are measured."""
    paths = {name: results / BOUNDS / f"{name}.json" for name in plan.data}
    return {name: read_bounds(path) for name, path in paths.items() if path.exists()}


def _expect_measured_alike(table: Table, bounds: dict[str, dict[str, Any]], results: Path) -> None:
    """
    Check that all results of a table were measured in the same way, with the same extractor and real images.

    Raises:
        ValueError: if they were not; the error names the file.
    """
    for name in ("fingerprint", INCEPTION_FINGERPRINT):
        every = [
            (run, row.results[run.seed][name])
            for row in table.rows
            for run in row.runs
            if name in row.results.get(run.seed, {})
        ]
        for run, fingerprint in every:
            real = bounds.get(run.data, {}).get("real", {}).get(name)
            try:
                # the scale of a classifier's guidance is what is compared
                expect_comparable(every[0][1], fingerprint, may_differ=("guidance_scale",))
                if real:
                    expect_comparable(real, fingerprint, may_differ=SAMPLING)
            except ValueError as error:
                raise ValueError(f"{results / run.key}.json: {error}") from error
