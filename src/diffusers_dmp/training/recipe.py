"""What a system trains differently from the plain DiT."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from .conditions import Conditions
from .denoiser import Denoiser
from .objectives.timesteps import StepExperts, random_experts


@dataclass(kw_only=True)
class TrainingRecipe:
    """
    What a system trains differently from the plain DiT; every default is the plain DiT's.

    Args:
        denoiser ([`Denoiser`], *optional*): How the model is called; by default as Diffusers' transformers are.
        conditions ([`Conditions`], *optional*): What the model is conditioned on; by default on class labels, dropped as
            the model's configuration says.
        expert_intervals ([`NoiseIntervals`], *optional*): Train one random expert in each step and process, at timesteps
            from that expert's interval alone. The model is called with the argument `expert`.
        expert (`int`, *optional*): Train this expert of `expert_intervals` alone, which is a model of its own, and is
            called without that argument.
        learning_rates (`dict[str, float]`): The learning rates of parameters that have one of their own, by name.
        auxiliary_weights (`Callable[[int], dict[str, float]]`): From the number of steps done to the weight of each
            auxiliary loss, by its name in the model's output.
        describe (`Callable[[nn.Module], dict[str, Any]]`): What the summary says of the model, before and after training.
        components (`Callable[[nn.Module], dict[str, ModelMixin]]`): The components of the saved pipeline that the trained
            model stands for.
        save (`Callable[[nn.Module], None]`, *optional*): Saves the trained model in the place of a pipeline.
    """

    denoiser: Denoiser | None = None
    conditions: Conditions | None = None
    expert_intervals: NoiseIntervals | None = None
    expert: int | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    auxiliary_weights: Callable[[int], dict[str, float]] = lambda step: {}
    describe: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    components: Callable[[nn.Module], dict[str, ModelMixin]] = lambda model: {"transformer": model}
    save: Callable[[nn.Module], None] | None = None

    @property
    def passes_expert(self) -> bool:
        """Whether the model is called with the expert that owns the timesteps."""
        return self.expert_intervals is not None and self.expert is None

    def step_experts(self, seed: int, step: int, num_processes: int) -> StepExperts | None:
        """The experts that a step trains, as a function of (seed, step) alone; None for a model without experts."""
        if self.expert_intervals is None:
            return None
        if self.expert is not None:
            return StepExperts(self.expert_intervals, [self.expert] * num_processes)
        owners = random_experts(seed, step, self.expert_intervals.num_experts, num_processes)
        return StepExperts(self.expert_intervals, owners)

    def noise_range(self, num_train_timesteps: int) -> tuple[float, float]:
        """The timesteps [low, high) that the model is trained on."""
        if self.expert_intervals is None or self.expert is None:
            return 0, num_train_timesteps
        return self.expert_intervals.edges[self.expert], self.expert_intervals.edges[self.expert + 1]
