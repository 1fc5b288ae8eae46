"""Progress bars of long runs: a bar on a terminal or in a notebook, one line every half a minute in a file."""

import sys
from typing import Any, TextIO

from tqdm import autonotebook, std
from tqdm.auto import tqdm

SECONDS_PER_LINE = 30
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s ({percentage:.0f} %) in {elapsed}, {remaining} to go{postfix}"


class LineFile:
    """
    Writes what a progress bar draws over and over as lines of their own.

    Args:
        file (`TextIO`): Where the lines go.
    """

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        """Write a line; what only moves the cursor is left out."""
        if text.strip():
            self.file.write(text.strip() + "\n")

    def flush(self) -> None:
        """Flush the file."""
        self.file.flush()


class LineProgress(tqdm):
    """Writes no line twice, as tqdm would at the end of what was interrupted, or had nothing to do."""

    displayed: tuple[Any, Any] | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, unless it says what the last one did."""
        if msg is None and self.displayed == (self.n, self.postfix):
            return
        self.displayed = (self.n, self.postfix)
        super().display(msg, pos)


def progress_bar(total: int, description: str, unit: str, initial: int = 0, disable: bool = False) -> tqdm:
    """
    A progress bar on stderr, as tqdm has them; where that is not a terminal, at most two lines a minute.

    Args:
        total (`int`): How many units there are.
        description (`str`): What is being done, such as "Training".
        unit (`str`): What is counted, in the singular.
        initial (`int`): How many units were done before.
        disable (`bool`): Whether to write nothing, as all processes but one.
    """
    if sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm:
        return tqdm(total=total, desc=description, unit=unit, initial=initial, disable=disable)
    return LineProgress(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=disable,
        file=LineFile(sys.stderr),
        bar_format=LINE,
        mininterval=SECONDS_PER_LINE,
        miniters=1,  # otherwise tqdm's own thread writes in between
    )


def duration(seconds: float) -> str:
    """
    A duration in words, in the two largest units: '3 h 20 min', '2 d 5 h', '40 s'.

    Args:
        seconds (`float`): Rounded to whole seconds.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    amounts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((index for index, (amount, _) in enumerate(amounts) if amount), len(amounts) - 1)
    return " ".join(f"{amount} {unit}" for amount, unit in amounts[first : first + 2] if amount) or "0 s"
