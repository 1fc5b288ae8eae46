"""What a system trains differently from the plain DiT."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from .arguments import TrainingArguments


@dataclass(kw_only=True)
class TrainingRecipe:
    """
    Args:
        expert_intervals ([`NoiseIntervals`], *optional*): Draw one expert per step and process, uniformly, and all its
            timesteps from that expert's interval. The model is told which by its argument `expert`.
        expert (`int`, *optional*): Train this one alone, a model of its own that need not be told.
        learning_rates (`dict[str, float]`): Of the parameters that have one of their own, by name.
        auxiliary_weights (`Callable[[int], dict[str, float]]`): From the steps done so far to how much each
            auxiliary loss counts, by its name in the model's output.
        describe (`Callable[[nn.Module], dict[str, Any]]`): What the summary says of the model, `before` and `after`
            training.
        components (`Callable[[nn.Module], dict[str, ModelMixin]]`): What the pipeline is to have of what was trained.
        objective (`nn.Module`, *optional*): To train on instead of a [`DiffusionObjective`], and called as one.
        save (`Callable[[nn.Module], None]`, *optional*): Write what was trained, instead of a pipeline.
    """

    expert_intervals: NoiseIntervals | None = None
    expert: int | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    auxiliary_weights: Callable[[int], dict[str, float]] = lambda step: {}
    describe: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    components: Callable[[nn.Module], dict[str, ModelMixin]] = lambda model: {"transformer": model}
    objective: nn.Module | None = None
    save: Callable[[nn.Module], None] | None = None

    def timestep_range(self, args: TrainingArguments) -> tuple[int, int]:
        """The timesteps [low, high) that the model is trained on."""
        if self.expert is None:
            return 0, args.num_train_timesteps
        low, high = self.expert_intervals.edges[self.expert :][:2]
        return math.ceil(low), math.ceil(high)
