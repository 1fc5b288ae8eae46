"""`training_summary.json`: what a finished training reports."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..saving.reading import read_json
from ..saving.whole import write_json

SUMMARY_NAME = "training_summary.json"


@dataclass(kw_only=True)
class TrainingSummary:
    """
    What a finished training reports.

    Args:
        steps (`int`): The optimiser steps of this run.
        train_seconds (`float`): Their duration.
        samples_per_expert (`list[int]`, *optional*): The number of samples that each expert was trained on.
        before, after (`dict[str, Any]`, *optional*): What the recipe says of the model before and after training, and the
            validation loss.
        experts (`list[dict]`, *optional*): The summaries of the experts' trainings that this one adds up.
    """

    steps: int
    train_seconds: float
    samples_per_expert: list[int] | None = None
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    experts: list[dict[str, Any]] | None = None

    @classmethod
    def of_experts(cls, folders: "Sequence[str | os.PathLike]") -> "TrainingSummary":
        """The sum of the summaries in the folders of all experts' trainings."""
        summaries = [read_json(Path(folder, SUMMARY_NAME)) for folder in folders]
        return cls(
            steps=sum(summary["steps"] for summary in summaries),
            train_seconds=sum(summary["train_seconds"] for summary in summaries),
            experts=summaries,
        )

    def save(self, folder: "str | os.PathLike") -> None:
        """Write `training_summary.json` into a folder."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        write_json(Path(folder, SUMMARY_NAME), values)
