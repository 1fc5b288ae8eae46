"""`best_checkpoint.json`: which checkpoint of a training had the lowest validation loss."""

import json
import math
import os
from pathlib import Path

from ..saving.whole import written_whole
from .checkpoints import PREFIX

BEST_NAME = "best_checkpoint.json"


class BestCheckpoint:
    """
    The lowest validation loss so far. Its checkpoint is one like the others, `checkpoint-<step>`, named by
    `best_checkpoint.json`.

    Args:
        output_dir: The training's folder.
        first_step (`int`): The number of steps that are done. What an earlier run recorded of a later step, which is done
            again, does not count.
    """

    def __init__(self, output_dir: "str | os.PathLike", first_step: int):
        self.path = Path(output_dir, BEST_NAME)
        self.step: int | None = None
        self.loss = math.inf
        if first_step and self.path.is_file():
            record = json.loads(self.path.read_text())
            if record["step"] <= first_step and Path(output_dir, f"{PREFIX}{record['step']}").is_dir():
                self.step, self.loss = record["step"], record["validation_loss"]

    def add(self, step: int, loss: float) -> None:
        """Compare a validation loss with the lowest so far."""
        if loss < self.loss:
            self.step, self.loss = step, loss

    def save(self) -> None:
        """Record the best checkpoint, after it was written."""
        record = {"checkpoint": f"{PREFIX}{self.step}", "step": self.step, "validation_loss": self.loss}
        with written_whole(self.path) as unfinished:
            unfinished.write_text(json.dumps(record) + "\n")
