"""The report: a page with tables and plots, made from the results' JSON files alone."""

import os
import statistics
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from diffusers_dmp.saving.whole import written_whole

from . import pictures
from .plan import Plan
from .tables import Table, num_better, read_all_bounds, read_tables

TEMPLATE = "results.md.jinja"
PLOTS = "plots"  # the folder of the plots, beside the results
METRICS = {"FID": 2, "KID": 3, "precision": 3, "recall": 3, "recognised": 3}  # decimal places
DATA = {"fashion": "Fashion-MNIST"}


def write_report(plan: Plan, results: Path, report: Path) -> None:
    """
    Write the page of all results that there are, and its plots beside them; what is missing is named on the page.

    Args:
        plan ([`Plan`]): All comparisons.
        results (`Path`): The folder of the plan's results.
        report (`Path`): The page.

    Raises:
        ValueError: if a result is not complete, or results of one table were not measured in the same way.
    """
    tables = read_tables(plan, results)
    for old in (results / PLOTS).glob("*.svg"):
        old.unlink()
    for table in tables:
        for kind, draw in pictures.plots(table).items():
            pictures.save(draw(table), results / PLOTS / f"{table.comparison.name}_{kind}.svg")
    page = make_page(plan, tables, read_all_bounds(plan, results), os.path.relpath(results, report.parent))
    with written_whole(report) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


def make_page(plan: Plan, tables: list[Table], bounds: dict[str, dict[str, Any]], folder: str) -> str:
    """
    Format the page.

    Args:
        plan ([`Plan`]), tables (`list[Table]`), bounds (`dict[str, dict]`): What it says.
        folder (`str`): That of the results, relative to the page.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"spread": spread, "difference": difference, "missing": missing}
    results = [result for table in tables for row in table.rows for result in row.results.values()]
    every = [*results, *bounds.values()]
    return environment.get_template(TEMPLATE).render(
        plan=plan,
        tables=tables,
        bounds=bounds,
        folder=folder,
        metrics=METRICS,
        data_titles=DATA,
        plots={table.comparison.name: list(pictures.plots(table)) for table in tables},
        unfinished=unfinished(tables),
        commits=sorted({result["commit"] for result in every}),
        hardware=sorted({result["hardware"] for result in results}),
    )


def unfinished(tables: list[Table]) -> str:
    """Say in one sentence how many runs are missing, and in which tables; empty if none is."""
    missing, of = sum(len(table.missing) for table in tables), sum(len(table.comparison.runs) for table in tables)
    if missing == of:
        return f"There are no results yet: all {of} runs are missing."
    parts = [
        f"{len(table.missing)} of {len(table.comparison.runs)} in “{table.comparison.title}”"
        for table in tables
        if table.missing
    ]
    return f"Unfinished: {missing} of {of} runs are missing: {', '.join(parts)}." if parts else ""


def missing(table: Table) -> str:
    """Say which runs of a table are missing, with their seeds; empty if none is."""
    seeds: dict[str, list[int]] = {}
    for run in table.missing:
        seeds.setdefault(run.title, []).append(run.seed)
    titles: dict[str, list[str]] = {}
    for title, own in seeds.items():
        titles.setdefault(", ".join(map(str, own)), []).append(title)
    parts = [f"{'; '.join(own)} (seed{'s' if ',' in seeds else ''} {seeds})" for seeds, own in titles.items()]
    begin = "Missing" if table.rows else "There is no result yet. Missing"
    return f"{begin}: {'; '.join(parts)}." if parts else ""


def spread(values: list[float], places: int, sign: str = "") -> str:
    """Format values as mean ± standard deviation; a dash if there are none."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):{sign},.{places}f}"
    return f"{mean} ± {statistics.stdev(values):,.{places}f}" if len(values) > 1 else mean


def difference(values: list[float], metric: str) -> str:
    """Format differences to the baseline as mean ± standard deviation, and for how many seeds they are for the better."""
    text = spread(values, METRICS[metric], sign="+")
    return f"{text} ({num_better(metric, values)} of {len(values)})" if values else text
