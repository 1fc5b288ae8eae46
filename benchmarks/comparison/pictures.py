"""The plots of a comparison's page: FID over training steps, over the cost of sampling and the scale of guidance; losses."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import Row, Table

SIZE = (8.5, 4.2)  # inches
COSTS_DIFFER = 1.05  # by this factor or more, costs are worth a plot
LOGARITHMIC = 4  # an axis whose values differ by this factor or more
LONG = 50  # characters of a title that needs the whole width
LINE = 0.18  # inches of a line of the legend
BASELINE_COLOUR = "black"
MARKERS = "os^vDPX*"
COLOURS = [f"C{index}" for index in (0, 1, 2, 3, 4, 6, 8, 9, 5, 7)]


def plots(table: Table) -> dict[str, Callable[[Table], Figure]]:
    """Return the functions that draw what a table's results are enough for: 'steps', 'losses', 'scales', 'cost'."""
    costs = [statistics.mean(row.values("gigaflops_per_image")) for row in table.rows]
    has_scales = len(guides(table)) > 1
    worth_it = {
        "steps": (bool(table.curves), steps_figure),
        "losses": (bool(table.with_losses), losses_figure),
        "scales": (has_scales, scales_figure),
        "cost": (not has_scales and bool(costs) and max(costs) >= COSTS_DIFFER * min(costs), cost_figure),
    }
    return {name: draw for name, (is_worth_it, draw) in worth_it.items() if is_worth_it}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file that is the same each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def steps_figure(table: Table) -> Figure:
    """Plot FID against training steps; the band is the standard deviation over the seeds."""
    figure, axes = _start("training steps", "FID (lower is better)")
    for row in table.curves:
        curve = row.curve()
        _plot(axes, list(curve), list(curve.values()), _colour(table, row), row.title)
    _scale(axes, [fid for row in table.curves for fids in row.curve().values() for fid in fids])
    axes.set_xlim(left=0)
    _legend(figure)
    return figure


def losses_figure(table: Table) -> Figure:
    """Plot by how many percent the losses differ from the baseline's; the band is the standard deviation over the seeds."""
    figure, axes = _start("eighths of the timesteps (left: almost clean, right: almost pure noise)", "difference in %")
    axes.axhline(0, color=BASELINE_COLOUR, linewidth=1, label="baseline (0 %)")
    for row in table.with_losses:
        changes = table.loss_changes(row)
        _plot(axes, range(1, len(changes) + 1), changes, _colour(table, row), table.label(row))
    axes.set_title("Loss by noise level: above 0, worse than the baseline")
    _legend(figure)
    return figure


def cost_figure(table: Table) -> Figure:
    """Plot FID against the cost of sampling; bars are the standard deviation over the seeds."""
    figure, axes = _start("10⁹ floating-point operations per image", "FID (lower is better)")
    for row in table.rows:
        fids = row.values("FID")
        cost, colour = statistics.mean(row.values("gigaflops_per_image")), _colour(table, row)
        axes.errorbar([cost], [statistics.mean(fids)], [_deviation(fids)], color=colour, label=row.title, **_MARKS)
    axes.set_xlim(0, 1.1 * max(cost for row in table.rows for cost in row.values("gigaflops_per_image")))
    _scale(axes, [fid for row in table.rows for fid in row.values("FID")])
    _legend(figure)
    return figure


def scales_figure(table: Table) -> Figure:
    """Plot FID and the share of recognised images against the scale of guidance; bars are the standard deviation."""
    figure = Figure(figsize=(SIZE[0] + 2, SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, metric, label in ((left, "FID", "FID (lower is better)"), (right, "recognised", "share recognised")):
        for index, (title, rows) in enumerate(guides(table).items()):
            values = [row.values(metric) for row in rows]
            means, deviations = map(statistics.mean, values), map(_deviation, values)
            scales = [row.scale for row in rows]
            own = {"color": COLOURS[index % len(COLOURS)], "label": title if axes is left else None}
            axes.errorbar(scales, list(means), list(deviations), **own, **_MARKS)
        for row in table.rows:
            if row.scale is None and row.values(metric):
                mean = statistics.mean(row.values(metric))
                axes.axhline(mean, color="grey", linestyle="--", label=row.title if axes is left else None)
        axes.set_xlabel("scale of guidance")
        axes.set_ylabel(label)
    _scale(left, [fid for row in table.rows for fid in row.values("FID")])
    right.set_ylim(0, 1)
    _legend(figure)
    return figure


def guides(table: Table) -> dict[str, list[Row]]:
    """Return the rows that one guide guides with several scales, by its title."""
    rows: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.scale is not None:
            rows.setdefault(row.title.rpartition(", scale ")[0], []).append(row)
    return {title: sorted(own, key=lambda row: row.scale) for title, own in rows.items() if len(own) > 1}


_MARKS = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.3}


def _start(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.25)
    return figure, axes


def _plot(axes: Axes, places: Sequence[float], values: list[list[float]], colour: str, title: str) -> None:
    """Plot means, with a band of the standard deviation."""
    means = [statistics.mean(own) for own in values]
    marker = MARKERS[len(axes.lines) % len(MARKERS)]
    axes.plot(places, means, marker=marker, color=colour, markersize=4.5, linewidth=1.3, label=title)
    low, high = ([mean + sign * _deviation(own) for mean, own in zip(means, values)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _scale(axes: Axes, values: list[float]) -> None:
    """Make the axis of values logarithmic if they differ much, with numbers that are read at once."""
    if min(values) > 0 and max(values) >= LOGARITHMIC * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")


def _colour(table: Table, row: Row) -> str:
    """The baseline is black; the others have the same colour in all plots of a table, whatever is missing."""
    others = [name for name in table.comparison.measured if name != table.comparison.baseline]
    return BASELINE_COLOUR if row.name not in others else COLOURS[others.index(row.name) % len(COLOURS)]


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _legend(figure: Figure) -> None:
    """Write the legend below, in a figure that is higher by as much: titles may be as long as it is wide."""
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    columns = 1 if max(map(len, labels), default=0) > LONG else 2
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LINE * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", fontsize=8, ncols=columns)
