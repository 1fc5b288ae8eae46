"""Train a Remix-DiT (https://arxiv.org/abs/2412.05628) from a pretrained DiT.

accelerate launch training/train_remix.py --config training/presets/remix_digits.yaml [--any_field value]
"""

from dataclasses import dataclass

from diffusers_dmp import RemixDiTModel
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import DiTTrainingArguments, option
from diffusers_dmp.training.dit_family import train_dit
from diffusers_dmp.training.parsing import run_entry_point
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.run import Publisher


@dataclass(kw_only=True)
class RemixTrainingArguments(DiTTrainingArguments):
    """A Remix-DiT."""

    num_bases: int = option(4, "K, the number of sets of weights that are mixed.")
    num_experts: int = option(8, "E, the number of experts, one for each interval of timesteps.")
    coefficient_learning_rate: float = option(
        1e-2, "Learning rate of the mixing coefficients; `learning_rate` is that of the weights."
    )
    prior_loss_weight: float = option(
        1e-4, "Initial weight of the prior on the mixing coefficients, annealed linearly to 0."
    )


def train_remix(args: RemixTrainingArguments, publisher: Publisher | None = None) -> None:
    """Train a Remix-DiT, and save its pipeline."""

    def recipe(model: RemixDiTModel) -> TrainingRecipe:
        return TrainingRecipe(
            expert_intervals=model.intervals,
            learning_rates={"mixing_logits": args.coefficient_learning_rate},
            # Deviation from reference: w·(1 - progress), where a misplaced bracket has w·(2 - progress), never below w
            auxiliary_weights=lambda step: {"prior_loss": args.prior_loss_weight * (1 - step / args.max_train_steps)},
            describe=lambda model: {"mixing_coefficients": model.mixing_coefficients.tolist()},
        )

    train_dit(RemixDiTModel, args, recipe, publisher)


if __name__ == "__main__":
    run_entry_point(RemixTrainingArguments, with_hub(train_remix))
