"""The results as a page with tables and pictures, made of the JSON files alone."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from diffusers_dmp.evaluation.fingerprint import expect_comparable

from .plan import Comparison, Plan

TEMPLATE = "results.md.jinja"
SAMPLING = ("num_inference_steps", "scheduler", "guidance_scale", "guidance_channels", "dtype", "tf32")
METRICS = {"FID": 2, "recognised": 3, "precision": 3, "recall": 3}  # digits behind the point


@dataclass(frozen=True)
class Row:
    """
    One line of a table: the same run with all its seeds.

    Args:
        title (`str`): What it is.
        results (`list[dict]`): One for each seed.
    """

    title: str
    results: list[dict[str, Any]]

    def last(self, metric: str) -> list[float]:
        """When its training is done, by seed."""
        values = [result["points"][-1].get(metric) for result in self.results]
        return [value for value in values if value is not None]

    def text(self, metric: str) -> str:
        """Mean ± standard deviation."""
        return spread(self.last(metric), METRICS[metric])

    def cost(self, name: str, places: int) -> str:
        """Of what all seeds have in common, but for noise."""
        values = [result[name] for result in self.results if result.get(name) is not None]
        return f"{statistics.mean(values):,.{places}f}" if values else "–"

    def difference(self, baseline: "Row") -> str:
        """Of FID, seed by seed."""
        first = {result["seed"]: result["points"][-1]["FID"] for result in baseline.results}
        own = {result["seed"]: result["points"][-1]["FID"] for result in self.results}
        changes = [own[seed] - first[seed] for seed in own if seed in first]
        better = sum(change < 0 for change in changes)
        return f"{spread(changes, 2, sign=True)}, better in {better} of {len(changes)}"


def spread(values: list[float], places: int, sign: bool = False) -> str:
    """Mean ± standard deviation over the seeds."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{'+' if sign else ''}.{places}f}"
    return f"{mean} ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


def write_report(plan: Plan, results: Path, path: Path) -> None:
    """
    Write the page, and its pictures beside the results.

    Raises:
        ValueError: if results that stand side by side were not measured alike.
    """
    page, figures = make_report(plan, results)
    for name, figure in figures.items():
        figure.savefig(results / f"{name}.png", dpi=100)
    path.write_text(page, encoding="utf-8")


def make_report(plan: Plan, results: Path) -> tuple[str, dict[str, Figure]]:
    """The page, and the pictures by the name of their comparison."""
    tables, figures = [], {}
    bounds = {name: read_json(results / "bounds" / f"{name}.json") for name in plan.data}
    for comparison in plan.comparisons:
        rows = read_rows(comparison, results)
        if rows:
            check_measured_alike(rows, bounds[comparison.data])
            tables.append(
                {
                    "comparison": comparison,
                    "rows": rows,
                    "has_labels": any(row.last("recognised") for row in rows),
                    "bounds": bounds[comparison.data],
                }
            )
            figures[comparison.name] = draw_figure(rows, bounds[comparison.data])
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    every = [result for table in tables for row in table["rows"] for result in row.results]
    page = environment.get_template(TEMPLATE).render(
        plan=plan,
        tables=tables,
        bounds=bounds,
        results=results.name,
        commits=sorted({result["commit"] for result in every}),
        hardware=sorted({result["hardware"] for result in every}),
        pictures=results.name,
    )
    return page, figures


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(comparison: Comparison, results: Path) -> list[Row]:
    """Of what is finished."""
    rows = []
    for runs in comparison.measured.values():
        paths = [results / f"{run.key}.json" for run in runs]
        found = [read_json(path) for path in paths if path.exists()]
        if found:
            rows.append(Row(runs[0].title, found))
    return rows


def check_measured_alike(rows: list[Row], bounds: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if they were not; see [`expect_comparable`].
    """
    first = rows[0].results[0]["fingerprint"]
    for row in rows:
        for result in row.results:
            # whether a classifier guides, and how strongly, is what is compared
            expect_comparable(first, result["fingerprint"], may_differ=("guidance_scale",))
    for bound in ("real", "noise"):
        expect_comparable(first, bounds[bound]["fingerprint"], may_differ=SAMPLING)


def draw_figure(rows: list[Row], bounds: dict[str, Any]) -> Figure:
    """FID against training steps, where there are several; and against what an image costs."""
    curves = [row for row in rows if len(row.results[0]["points"]) > 1]
    figure = Figure(figsize=(11 if curves else 6, 4), layout="constrained")
    panels = list(figure.subplots(1, 2 if curves else 1, squeeze=False).flat)
    colours = {row.title: f"C{index}" for index, row in enumerate(rows)}
    for row in curves:
        steps = [point["step"] for point in row.results[0]["points"]]
        values = [[result["points"][index]["FID"] for result in row.results] for index in range(len(steps))]
        means = [statistics.mean(each) for each in values]
        panels[0].plot(steps, means, "o-", color=colours[row.title], label=row.title, markersize=4)
        panels[0].fill_between(steps, *zip(*[(min(each), max(each)) for each in values]), alpha=0.15)
    for row in rows:
        cost = row.results[0]["gigaflops_per_image"]
        found = row.last("FID")
        panels[-1].scatter([cost] * len(found), found, color=colours[row.title], label=row.title, s=18)
    for panel in panels:
        panel.axhline(bounds["real"]["FID"], color="grey", linestyle="--", linewidth=1, label="real, held out")
        panel.set_yscale("log")
        panel.set_ylabel("FID")
    if curves:
        panels[0].set_xlabel("training steps")
    panels[-1].set_xlabel("10⁹ operations per image")
    panels[-1].set_xlim(left=0)
    panels[-1].legend(fontsize=8)
    return figure
