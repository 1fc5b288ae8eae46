"""The report: a page with tables and figures, made from the results' JSON files alone."""

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from diffusers_dmp.evaluation.fingerprint import expect_comparable

from .plan import Comparison, Plan

TEMPLATE = "results.md.jinja"
BOUNDS = "bounds"  # the folder of the metrics of real images and of noise
# entries of a fingerprint that only sampled images have; and of a small data set there are fewer real images than sampled ones
SAMPLING = ("num_inference_steps", "scheduler", "scheduler_sha256", "vae_sha256", "guidance_scale", "guidance_channels",
            "dtype", "tf32", "prompts_sha256", "num_samples")  # fmt: skip
METRICS = {"FID": 2, "recognised": 3, "precision": 3, "recall": 3}  # decimal places


@dataclass(frozen=True)
class Row:
    """
    One row of a table: a run with all its seeds.

    Args:
        name, title (`str`): Name and title of the run.
        results (`list[dict]`): One for each finished seed.
    """

    name: str
    title: str
    results: list[dict[str, Any]]

    def last(self, metric: str) -> list[float]:
        """Return the metric at the end of training, one value per seed."""
        values = [result["points"][-1].get(metric) for result in self.results]
        return [value for value in values if value is not None]

    def text(self, metric: str) -> str:
        """Format the metric as mean ± standard deviation."""
        return spread(self.last(metric), METRICS[metric])

    def cost(self, name: str, places: int) -> str:
        """Format the mean of a cost over the seeds, with `places` decimal places."""
        values = [result[name] for result in self.results if result.get(name) is not None]
        return f"{statistics.mean(values):,.{places}f}" if values else "–"

    def changes(self, baseline: "Row") -> list[float]:
        """Return how much higher FID is than the baseline's, seed by seed."""
        own, other = (
            {result["seed"]: result["points"][-1]["FID"] for result in row.results} for row in (self, baseline)
        )
        return [own[seed] - other[seed] for seed in own if seed in other]

    def difference(self, baseline: "Row") -> str:
        """Format the changes of FID, and with how many seeds it is lower."""
        changes = self.changes(baseline)
        better = sum(change < 0 for change in changes)
        return f"{spread(changes, 2, sign=True)}, better in {better} of {len(changes)}" if changes else "–"


@dataclass(frozen=True)
class Table:
    """
    The results of a comparison.

    Args:
        comparison ([`Comparison`]): The comparison.
        rows (`list[Row]`): The runs that have results.
        bounds (`dict[str, Any]`): The metrics of real images and of noise.
    """

    comparison: Comparison
    rows: list[Row]
    bounds: dict[str, Any]

    @property
    def baseline(self) -> Row:
        """The row that the others are compared with; the first row as long as it has no results."""
        own = [row for row in self.rows if row.name == self.comparison.baseline]
        return (own or self.rows)[0]

    @property
    def metrics(self) -> list[str]:
        """The metrics that have values."""
        return [metric for metric in METRICS if any(row.last(metric) for row in self.rows)]

    def bound(self, name: str, metric: str) -> str:
        """Format a metric of real images ('real') or of noise ('noise')."""
        value = self.bounds[name].get(metric)
        return "–" if value is None else f"{value:.{METRICS[metric]}f}"

    def verdict(self) -> str:
        """Say which rows have a lower FID than the baseline: with every seed, with some seeds only, with no seed."""
        groups: dict[str, list[str]] = {"with every seed": [], "with some seeds only": [], "with no seed": []}
        for row in self.rows:
            changes = row.changes(self.baseline) if row is not self.baseline else []
            if changes:
                better = sum(change < 0 for change in changes)
                which = "every seed" if better == len(changes) else "some seeds only" if better else "no seed"
                groups[f"with {which}"].append(row.title)
        parts = [f"{which}: {'; '.join(titles)}" for which, titles in groups.items() if titles]
        return f"A lower FID than “{self.baseline.title}” {', '.join(parts)}." if parts else ""


def spread(values: list[float], places: int, sign: bool = False) -> str:
    """Format the mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{places}f}"
    return f"{mean} ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


def write_report(plan: Plan, results: Path, path: Path) -> None:
    """
    Write the page, and its figures into the results' folder.

    Args:
        plan ([`Plan`]): All comparisons.
        results (`Path`): The folder of the plan's results.
        path (`Path`): The page.

    Raises:
        ValueError: if results of one table were not measured in the same way.
    """
    tables = read_tables(plan, results)
    for table in tables:
        draw_figure(table).savefig(results / f"{table.comparison.name}.png", dpi=100)
    path.write_text(make_page(plan, tables, os.path.relpath(results, path.parent)), encoding="utf-8")


def read_tables(plan: Plan, results: Path) -> list[Table]:
    """
    Read the results of all finished runs.

    Raises:
        ValueError: see [`write_report`].
    """
    tables = []
    for comparison in plan.comparisons:
        rows = read_rows(comparison, results)
        if rows:
            table = Table(comparison, rows, read_json(results / BOUNDS / f"{comparison.data}.json"))
            check_measured_alike(table)
            tables.append(table)
    return tables


def make_page(plan: Plan, tables: list[Table], pictures: str) -> str:
    """
    Render the page.

    Args:
        plan ([`Plan`]): All comparisons.
        tables (`list[Table]`): Their results.
        pictures (`str`): The folder of the figures, relative to the page.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    every = [result for table in tables for row in table.rows for result in row.results]
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        tables=tables,
        pictures=pictures,
        held_out={table.comparison.data: table.bounds["number"] for table in tables},
        commits=sorted({result["commit"] for result in every}),
        hardware=sorted({result["hardware"] for result in every}),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(comparison: Comparison, results: Path) -> list[Row]:
    """Read the results of a comparison, row by row; unfinished runs are left out."""
    rows = []
    for runs in comparison.measured.values():
        paths = [results / f"{run.key}.json" for run in runs]
        found = [read_json(path) for path in paths if path.exists()]
        if found:
            rows.append(Row(runs[0].name, runs[0].title, found))
    return rows


def check_measured_alike(table: Table) -> None:
    """
    Check that all results of a table were measured in the same way.

    Raises:
        ValueError: if they were not; see [`expect_comparable`].
    """
    first = table.rows[0].results[0]["fingerprint"]
    for row in table.rows:
        for result in row.results:
            # guidance by a classifier is what is compared
            expect_comparable(first, result["fingerprint"], may_differ=("guidance_scale",))
    for bound in ("real", "noise"):
        expect_comparable(first, table.bounds[bound]["fingerprint"], may_differ=SAMPLING)


def draw_figure(table: Table) -> Figure:
    """Draw FID against training steps, if there are several pipelines, and against the cost of an image."""
    curves = [row for row in table.rows if len(row.results[0]["points"]) > 1]
    figure = Figure(figsize=(13 if curves else 8, 4), layout="constrained")
    panels = list(figure.subplots(1, 2 if curves else 1, squeeze=False).flat)
    colours = {row.name: f"C{index}" for index, row in enumerate(table.rows)}
    for row in curves:
        by_step: dict[int, list[float]] = {}
        for point in (point for result in row.results for point in result["points"]):
            by_step.setdefault(point["step"], []).append(point["FID"])
        means = [statistics.mean(values) for values in by_step.values()]
        panels[0].plot(list(by_step), means, "o-", color=colours[row.name], markersize=4)
        low, high = zip(*[(min(values), max(values)) for values in by_step.values()])
        panels[0].fill_between(list(by_step), low, high, color=colours[row.name], alpha=0.15, linewidth=0)
    for row in table.rows:
        costs = [result["gigaflops_per_image"] for result in row.results]
        panels[-1].scatter(costs, row.last("FID"), color=colours[row.name], label=row.title, s=18)
    for panel in panels:
        real = panel.axhline(table.bounds["real"]["FID"], color="grey", linestyle="--", linewidth=1)
        panel.set_yscale("log")
        panel.set_ylabel("FID")
    real.set_label("real images, held out")
    panels[0].set_xlabel("training steps")
    panels[-1].set_xlabel("10⁹ floating-point operations per image")
    panels[-1].set_xlim(0, 1.1 * max(result["gigaflops_per_image"] for row in table.rows for result in row.results))
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
