"""What a system trains differently from the plain DiT."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from .conditions import Conditions
from .denoiser import Denoiser
from .objectives.timesteps import StepExperts, balanced_experts, random_experts


@dataclass(kw_only=True)
class TrainingRecipe:
    """
    What a system trains differently from the plain DiT; every default is the plain DiT's.

    Args:
        denoiser ([`Denoiser`], *optional*): How the model is called; by default as Diffusers' transformers are.
        conditions ([`Conditions`], *optional*): What the model is conditioned on; by default on class labels, dropped as
            the model's configuration says.
        expert_intervals ([`NoiseIntervals`], *optional*): The intervals of the experts that are trained. Losses are reported
            for each of them.
        expert (`int`, *optional*): Train this expert of `expert_intervals` alone, at timesteps from its interval.
        expert_batches (`str`): Which experts a step trains, without `expert`: "one" random expert in each process, at timesteps
            from that expert's interval alone; "mixed", all of them, with equally many samples; or those that the "density" of
            the timesteps brings.
        shares_expert (`bool`): Whether "one" expert is the same in all processes, as sharded weights need it.
        passes_expert (`bool`): Whether a model is called with the argument `expert` where a process trains one.
        learning_rates (`dict[str, float]`): The learning rates of parameters that have one of their own, by name.
        auxiliary_weights (`Callable[[int], dict[str, float]]`): From the number of steps done to the weight of each
            auxiliary loss, by its name in the model's output.
        describe (`Callable[[nn.Module], dict[str, Any]]`): What the summary says of the model, before and after training.
        components (`Callable[[nn.Module], dict[str, ModelMixin]]`): The components of the saved pipeline that the trained
            model stands for.
        save (`Callable[[nn.Module], None]`, *optional*): Saves the trained model in the place of a pipeline.
        save_to (`Callable[[nn.Module, Path], None]`, *optional*): Saves the model with its present weights in a folder, at the end
            and along the way; by default its pipeline is saved.
        saved_name (`str`): That folder's name in `output_dir`, which along the way is followed by the step.
        make_pipeline (`Callable[[nn.Module], DiffusionPipeline]`, *optional*): The pipeline of the model with its present
            weights; by default a [`ClassConditionalPipeline`] of the `components`.
        generate (`Callable[[DiffusionPipeline, torch.Generator], list[list[PIL.Image.Image]]]`, *optional*): Generates a grid
            of samples, row by row, with that pipeline; by default some of each class.
    """

    denoiser: Denoiser | None = None
    conditions: Conditions | None = None
    expert_intervals: NoiseIntervals | None = None
    expert: int | None = None
    expert_batches: Literal["one", "mixed", "density"] = "one"
    shares_expert: bool = False
    passes_expert: bool = True
    learning_rates: dict[str, float] = field(default_factory=dict)
    auxiliary_weights: Callable[[int], dict[str, float]] = lambda step: {}
    describe: Callable[[nn.Module], dict[str, Any]] = lambda model: {}
    components: Callable[[nn.Module], dict[str, ModelMixin]] = lambda model: {"transformer": model}
    save: Callable[[nn.Module], None] | None = None
    save_to: Callable[[nn.Module, Path], None] | None = None
    saved_name: str = "pipeline"
    make_pipeline: Callable[[nn.Module], DiffusionPipeline] | None = None
    generate: Callable[[Any, torch.Generator], list[list[PIL.Image.Image]]] | None = None

    def step_experts(self, seed: int, step: int, num_processes: int, batch_size: int) -> StepExperts | None:
        """The experts that a step trains, as a function of (seed, step) alone; None where the timesteps decide."""
        intervals = self.expert_intervals
        if intervals is None:
            return None
        if self.expert is not None:
            return StepExperts(intervals, [self.expert] * num_processes)
        if self.expert_batches == "density":
            return None
        if self.expert_batches == "mixed":
            return StepExperts(intervals, balanced_experts(step, intervals.num_experts, batch_size))
        owners = random_experts(seed, step, intervals.num_experts, 1 if self.shares_expert else num_processes)
        return StepExperts(intervals, owners * (num_processes // len(owners)))

    def expert_argument(self, experts: StepExperts | None, process: int) -> int | None:
        """The expert that a process calls the model with in a step; None for a call without that argument."""
        is_one = experts is not None and self.expert is None and self.expert_batches == "one"
        return experts.owners[process] if experts is not None and is_one and self.passes_expert else None

    def noise_range(self, num_train_timesteps: int) -> tuple[float, float]:
        """The timesteps [low, high) that the model is trained on."""
        if self.expert_intervals is None or self.expert is None:
            return 0, num_train_timesteps
        return self.expert_intervals.edges[self.expert], self.expert_intervals.edges[self.expert + 1]
