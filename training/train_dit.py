"""Train a plain DiT, the baseline of all systems, or several that share the noise levels among them.

accelerate launch training/train_dit.py --config training/presets/dit_digits.yaml [--any_field value]
"""

from dataclasses import dataclass

from diffusers_dmp import DiTModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import BoundaryArguments, DiTTrainingArguments, ExpertArguments
from diffusers_dmp.training.data.training_data import load_training_data
from diffusers_dmp.training.dit_family import make_model, train_dit
from diffusers_dmp.training.experts import ExpertTraining
from diffusers_dmp.training.objectives.from_arguments import make_objective, make_scheduler
from diffusers_dmp.training.parsing import run_entry_point
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.run import Publisher
from diffusers_dmp.training.split import train_split
from diffusers_dmp.training.trainer import make_accelerator


@dataclass(kw_only=True)
class DiTExpertTrainingArguments(BoundaryArguments, ExpertArguments, DiTTrainingArguments):
    """A DiT, or an independent one for each interval of noise levels, with `max_train_steps` each."""

    def __post_init__(self):
        super().__post_init__()
        given = [*self.given_boundaries, *["num_experts"] * (self.num_experts is not None)]
        if len(given) > 1:
            raise ValueError(f"Expected the intervals to be given in one way, but got {' and '.join(given)}.")
        if given and self.objective != "ddpm":
            raise ValueError(f"Expected no `{given[0]}` for the objective {self.objective!r}, but for ddpm alone.")
        if self.num_experts is not None:
            self.check_at_least_one("num_experts")
        self.check_expert(self.count_experts())


def train_independent(args: DiTExpertTrainingArguments, publisher: Publisher | None = None) -> None:
    """Train one DiT, or one for each interval, and save their pipeline."""
    if args.count_experts() == 1:
        train_dit(DiTModel, args, publisher=publisher)
        return
    data = load_training_data(make_accelerator(args), args)
    in_latents = data.vae is not None
    scheduler = make_scheduler(args, in_latents)
    intervals = args.intervals(scheduler)

    def prepare(expert: int) -> ExpertTraining:
        model = make_model(DiTModel, args, data)
        recipe = TrainingRecipe(expert_intervals=intervals, expert=expert)
        return ExpertTraining(model=model, objective=make_objective(args, model, in_latents), recipe=recipe)

    train_split(args, data, intervals, intervals.snr_boundaries(scheduler), prepare)


if __name__ == "__main__":
    run_entry_point(DiTExpertTrainingArguments, with_hub(train_independent))
