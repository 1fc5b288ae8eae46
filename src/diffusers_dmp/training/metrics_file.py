"""`metrics.jsonl`: what a training logs, one JSON object for each step that was logged."""

import json
import math
from pathlib import Path
from typing import Any

from ..saving.whole import written_whole

METRICS_NAME = "metrics.jsonl"


class MetricsFile:
    """
    Appends to `metrics.jsonl`, of which a resumed run keeps what belongs to the steps before it.

    What is not finite, as the norm of the gradients in fp16 at times, is null, since JSON has no such numbers.

    Args:
        path (`Path`): The file.
        first_step (`int`): The number of steps that are done; what the file has of later ones is removed, since they are done
            again.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= first_step]
        with written_whole(path) as unfinished:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; without a last one that was cut off, and none if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
