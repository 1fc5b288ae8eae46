"""The checkpoint of a training with the lowest validation loss: one like the others, named by `best_checkpoint.json`."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from ..saving.whole import write_json
from .checkpoints import BEST_NAME, PREFIX, recorded_best

logger = logging.getLogger(__name__)


class BestCheckpoint:
    """
    The lowest validation loss so far, and the step after which it was measured.

    Args:
        output_dir: The training's folder.
        first_step (`int`): The number of steps that are done. What an earlier run recorded of a later step, which is done
            again, is forgotten.
        validation (`dict[str, Any]`): What identifies the held-out images and how they are noised: losses of other ones do
            not compare, and are forgotten with a warning. Empty without validation.
        is_main_process (`bool`): Whether to forget it on the disk as well, and to warn.
    """

    def __init__(
        self,
        output_dir: "str | os.PathLike",
        first_step: int,
        validation: dict[str, Any],
        is_main_process: bool = True,
    ):
        self.validation = validation
        self.path = Path(output_dir, BEST_NAME)
        self.step: int | None = None
        self.loss = math.inf
        record = recorded_best(output_dir)
        if record is not None and validation and record.get("validation", validation) != validation:
            if is_main_process:
                logger.warning(
                    "The best checkpoint so far, %s, was validated otherwise: forgotten.", record["checkpoint"]
                )
            record = None
        if record is not None and record["step"] <= first_step and self.path.with_name(record["checkpoint"]).is_dir():
            self.step, self.loss = record["step"], record["validation_loss"]
        elif is_main_process:
            self.path.unlink(missing_ok=True)

    def add(self, step: int, loss: float) -> None:
        """Compare a validation loss with the lowest so far."""
        if loss < self.loss:
            self.step, self.loss = step, loss

    def save(self) -> None:
        """Record the best checkpoint, once it is written and before the one that was best until then may be removed."""
        record = {
            "checkpoint": f"{PREFIX}{self.step}",
            "step": self.step,
            "validation_loss": self.loss,
            "validation": self.validation,
        }
        write_json(self.path, record)
