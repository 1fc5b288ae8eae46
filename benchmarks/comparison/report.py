"""The report: a page with tables and plots, made from the results' JSON files alone."""

import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from diffusers_dmp.saving.whole import written_whole

from . import pictures
from .plan import Plan
from .results import BY_INCEPTION
from .tables import LOWER_IS_BETTER, Table, num_better, read_all_bounds, read_tables

TEMPLATE = "results.md.jinja"
PLOTS = "plots"  # the folder of the plots, beside the results
METRICS = {"FID": 2, "KID": 3, "precision": 3, "recall": 3, "recognised": 3, BY_INCEPTION: 2}  # decimal places
HEADERS = {BY_INCEPTION: "FID, Inception"}  # where they are not the metrics' names
DATA = {"fashion": "Fashion-MNIST", "digits": "scikit-learn's digits"}
SOURCES = {
    "fashion": "https://github.com/zalandoresearch/fashion-mnist",
    "digits": "https://archive.ics.uci.edu/dataset/80",
}
KINDS = {"real": "training images", "noise": "images of uniform noise"}  # of bounds
IMAGES_IN_A_ROW = 3
NOTHING = "–"

Cells = list[list[str]]  # of a table on the page, with its header


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
    drawn = {
        results / PLOTS / f"{table.comparison.name}_{kind}.svg": draw(table)
        for table in tables
        for kind, draw in pictures.plots(table).items()
    }
    for path, figure in drawn.items():
        pictures.save(figure, path)
    for old in set((results / PLOTS).glob("*.svg")) - set(drawn):
        old.unlink()
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
    results = [result for table in tables for row in table.rows for result in row.results.values()]
    parts = [
        {
            "comparison": table.comparison,
            "missing": missing(table),
            "trained_again": table.trained_again,
            "metrics": metrics_cells(table),
            "differences": difference_cells(table) if table.compared else [],
            "has_baseline": any(row.name == table.comparison.baseline for row in table.rows),
            "verdicts": {seeds: [table.label(row) for row in rows] for seeds, rows in table.verdicts().items()},
            "curves": table.curves,
            "steps": steps_cells(table),
            "losses": losses_cells(table) if table.with_losses else [],
            "plots": pictures.plots(table),
            "noises": table.noises,
            "images": images_cells(table, folder),
        }
        for table in tables
    ]
    page = environment.get_template(TEMPLATE).render(
        plan=plan,
        parts=parts,
        unfinished=unfinished(tables),
        data=DATA,
        sources=SOURCES,
        bounds=bounds,
        bounds_cells=bounds_cells(bounds),
        folder=folder,
        by_inception=any(result["points"][-1].get(BY_INCEPTION) is not None for result in results),
        commits=sorted({result["commit"] for result in [*results, *bounds.values()]}),
        hardware=sorted({result["hardware"] for result in results}),
    )
    return page.rstrip() + "\n"


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
    titles: dict[tuple[int, ...], list[str]] = {}
    for title, own in seeds.items():
        titles.setdefault(tuple(own), []).append(title)
    parts = [] if table.rows else ["There is no result yet."]
    for own, some in titles.items():
        every = {run.title for run in table.comparison.runs if run.seed in own}
        names = f"all {len(every)} runs" if every == set(some) and len(some) > 1 else "; ".join(some)
        parts.append(f"Missing with seed{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}: {names}.")
    return " ".join(parts)


def bounds_cells(bounds: dict[str, dict[str, Any]]) -> Cells:
    """Return the table of the best and the worst that can be expected."""
    measured = {
        f"{DATA.get(data, data)}, {own['number']:,} {title}": own[kind]
        for data, own in bounds.items()
        for kind, title in KINDS.items()
    }
    shown = _shown(any(BY_INCEPTION in bound for bound in measured.values()))
    rows = [
        [
            title,
            *(
                spread([value for value in [bound.get(metric)] if value is not None], shown[metric])
                for metric in shown
            ),
        ]
        for title, bound in measured.items()
    ]
    return [_header(shown), *rows]


def metrics_cells(table: Table) -> Cells:
    """Return the table of metrics at the end of training, and of costs."""
    costs = ["seeds", "parameters", "10⁹ operations per image"]
    shown = _shown_in(table)
    rows = [
        [row.title]
        + [spread(row.values(metric), places) for metric, places in shown.items()]
        + [f"{len(row.results)} of {len(row.runs)}" if len(row.results) < len(row.runs) else str(len(row.runs))]
        + [spread(row.values("parameters")[:1], 0), spread(row.values("gigaflops_per_image")[:1], 3)]  # of every seed
        for row in table.rows
    ]
    return [_header(shown) + costs, *rows]


def difference_cells(table: Table) -> Cells:
    """Return the table of differences to the baseline, with the number of seeds for which they are for the better."""
    rows, shown = [], _shown_in(table)
    for row in table.compared:
        cells = [table.label(row)]
        for metric, places in shown.items():
            values = table.differences(row, metric)
            better = f" ({num_better(metric, values)} of {len(values)})" if values else ""
            cells.append(spread(values, places, sign="+") + better)
        rows.append(cells)
    return [_header(shown), *rows]


def steps_cells(table: Table) -> Cells:
    """Return the table of FID by training step."""
    steps = sorted({step for row in table.curves for step in row.curve()})
    rows = [
        [row.title] + [spread(row.curve().get(step, []), METRICS["FID"]) for step in steps] for row in table.curves
    ]
    return [["steps"] + [f"{step:,}" for step in steps], *rows]


def losses_cells(table: Table) -> Cells:
    """Return the table of losses by noise level, as differences to the baseline in percent."""
    rows = [
        [table.label(row)] + [spread(changes, 1, sign="+") for changes in table.loss_changes(row)]
        for row in table.with_losses
    ]
    num_bands = len(rows[0]) - 1
    return [["timesteps"] + [f"{band}/{num_bands}" for band in range(1, num_bands + 1)], *rows]


def images_cells(table: Table, folder: str) -> list[Cells]:
    """Return tables of images, some side by side."""
    rows = [row for row in table.rows if row.grid]
    groups = [rows[start : start + IMAGES_IN_A_ROW] for start in range(0, len(rows), IMAGES_IN_A_ROW)]
    return [
        [
            [row.title for row in some],
            [f"![{row.title}]({folder}/{table.comparison.name}/{row.grid.name})" for row in some],
        ]
        for some in groups
    ]


def spread(values: list[float], places: int, sign: str = "") -> str:
    """Format values as mean ± standard deviation; a dash if there are none."""
    if not values:
        return NOTHING
    mean = f"{statistics.mean(values):{sign},.{places}f}"
    return f"{mean} ± {statistics.stdev(values):,.{places}f}" if len(values) > 1 else mean


def _shown_in(table: Table) -> dict[str, int]:
    """Return the metrics of a table and their decimal places."""
    return _shown(any(row.values(BY_INCEPTION) for row in table.rows))


def _shown(by_inception: bool) -> dict[str, int]:
    """Return all metrics, or all but that by Inception, and their decimal places."""
    return {metric: places for metric, places in METRICS.items() if by_inception or metric != BY_INCEPTION}


def _header(metrics: Iterable[str]) -> list[str]:
    return ["", *(f"{HEADERS.get(metric, metric)} {'↓' if metric in LOWER_IS_BETTER else '↑'}" for metric in metrics)]
