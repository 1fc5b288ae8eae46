"""The figures of `benchmarks.speed`: kept in a file, compared, and printed as tables."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffusers_dmp.training.utilisation import DeviceLimits

from .timing import Ratio, Settings, commit, hardware


@dataclass(frozen=True)
class Cell:
    """
    A place in the table.

    Args:
        what (`str`): What was done, such as 'forward B=1'.
        how (`str`): 'eager', or how it was compiled.
        system (`str`): The denoiser.
    """

    what: str
    how: str
    system: str


@dataclass(frozen=True)
class Group:
    """
    Figures that are measured in turns.

    Args:
        cells (`list[Cell]`): Their places.
        prepare (`Callable`): Makes what is timed: the functions by their cells, and the bytes that each must move at least.
    """

    cells: list[Cell]
    prepare: Callable[[], tuple[dict[Cell, Callable[[], object]], dict[Cell, int]]]


@dataclass(frozen=True)
class Figure:
    """
    What was measured of a cell.

    Args:
        cell ([`Cell`]): Its place.
        times (`list[float]`): The seconds of a call in each round.
        flops (`int`): The floating-point operations of a call.
        moved (`int`): The bytes that a call must move at least.
    """

    cell: Cell
    times: list[float]
    flops: int
    moved: int

    @property
    def seconds(self) -> float:
        """The median time of a call."""
        return statistics.median(self.times)

    @property
    def in_ms(self) -> str:
        """The median time of a call in milliseconds, with its quartiles."""
        low, middle, high = (1e3 * quartile for quartile in statistics.quantiles(self.times, n=4))
        return f"{middle:.2f} ({low:.2f}–{high:.2f})"


class Table:
    """
    The figures of a dtype.

    Args:
        settings ([`Settings`]): For the file of results, and what they hold for.
        dtype (`torch.dtype`): The dtype.

    Raises:
        ValueError: if the results were measured on another device, at another commit, or of models of another size.
    """

    def __init__(self, settings: Settings, dtype: torch.dtype):
        self.dtype, self.path = dtype, settings.results
        self.conditions = {"device": hardware(settings.device), "commit": commit(), "preset": settings.preset}
        self.figures: dict[Cell, Figure] = {}
        self._compared: set[tuple[Cell, Cell]] = set()
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                self._read(json.loads(line))

    def _read(self, record: dict[str, Any]) -> None:
        found = {name: record.pop(name) for name in self.conditions}
        if found != self.conditions:
            raise ValueError(f"Expected `results` to be those of {self.conditions}, but got {self.path} of {found}.")
        if record.pop("dtype") == str(self.dtype):
            figure = Figure(**record | {"cell": Cell(**record["cell"])})
            self.figures[figure.cell] = figure

    def has(self, cells: list[Cell]) -> bool:
        """Whether all these cells were measured."""
        return all(cell in self.figures for cell in cells)

    def add(self, figures: list[Figure]) -> None:
        """Add what was measured, and write it to the file."""
        self.figures |= {figure.cell: figure for figure in figures}
        if self.path is not None:
            records = [self.conditions | {"dtype": str(self.dtype)} | asdict(figure) for figure in figures]
            with self.path.open("a") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in records)

    def ratio(self, cell: Cell, baseline: Cell, target: float | None) -> Iterator[Ratio]:
        """Compare two cells, if both were measured and this is the first time."""
        if (cell, baseline) in self._compared or not self.has([cell, baseline]):
            return
        self._compared.add((cell, baseline))
        differing = [(a, b) for a, b in ((cell.how, baseline.how), (cell.system, baseline.system)) if a != b]
        shared = [cell.what, *(a for a, b in ((cell.how, baseline.how), (cell.system, baseline.system)) if a == b)]
        names = " / ".join(", ".join(reversed(side)) for side in zip(*differing))
        name = f"{self._dtype_name} {', '.join(shared)}: {names}"
        yield Ratio.of(name, self.figures[cell].times, self.figures[baseline].times, target)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def in_milliseconds(self, systems: list[str]) -> str:
        """A table of the median times: what was done in the rows, the systems in the columns."""
        rows = dict.fromkeys((cell.what, cell.how) for cell in self.figures)
        lines = [f"\n| {self._dtype_name}, ms | {' | '.join(systems)} |", "| --- " * (1 + len(systems)) + "|"]
        for what, how in rows:
            found = [self.figures.get(Cell(what, how, system)) for system in systems]
            times = ["" if figure is None else f"{1e3 * figure.seconds:.2f}" for figure in found]
            lines.append(f"| {what}, {how} | {' | '.join(times)} |")
        return "\n".join(lines)

    def beside_limits(self, limits: DeviceLimits) -> str:
        """A table of operations and bytes, and the shares of what the device reached in a matrix product and in a copy."""
        product, copy = 1e-12 * limits.flops_per_second, 1e-9 * limits.bytes_per_second
        lines = [
            f"\nA matrix product reached {product:.2f} TFLOP/s, a copy {copy:.1f} GB/s.\n",
            "| what | system | ms (quartiles) | GFLOPs | of the product's | GB at least | of the copy's |",
            "| --- " * 7 + "|",
        ]
        for cell, figure in self.figures.items():
            flops_share = figure.flops / figure.seconds / limits.flops_per_second
            bytes_share = figure.moved / figure.seconds / limits.bytes_per_second
            lines.append(
                f"| {self._dtype_name} {cell.what}, {cell.how} | {cell.system} | {figure.in_ms} "
                f"| {1e-9 * figure.flops:,.1f} | {flops_share:.1%} | {1e-9 * figure.moved:.3f} | {bytes_share:.1%} |"
            )
        return "\n".join(lines)
