"""Train a Remix-DiT (https://arxiv.org/abs/2412.05628) from a pretrained DiT.

accelerate launch training/train_remix.py --config training/presets/remix_digits.yaml [--any_field value]
"""

from dataclasses import dataclass

from diffusers_dmp import RemixDiTModel
from diffusers_dmp.training.arguments import DiTTrainingArguments, option, parse_arguments
from diffusers_dmp.training.dit import train_dit
from diffusers_dmp.training.recipe import TrainingRecipe


@dataclass(kw_only=True)
class RemixTrainingArguments(DiTTrainingArguments):
    num_bases: int = option(4, "K, sets of weights.")
    num_experts: int = option(8, "N, mixtures of them, one for each stretch of the timesteps.")
    coefficient_learning_rate: float = option(1e-2, "Of the mixing coefficients; `learning_rate` is the weights'.")
    prior_loss_weight: float = option(1e-4, "Of the prior on the mixing coefficients, annealed linearly to 0.")


def train_remix(args: RemixTrainingArguments) -> None:
    def recipe(model: RemixDiTModel) -> TrainingRecipe:
        return TrainingRecipe(
            expert_intervals=model.intervals,
            learning_rates={"mixing_logits": args.coefficient_learning_rate},
            # Deviation from reference: w·(1 - progress), where a misplaced bracket has w·(2 - progress), never below w
            auxiliary_weights=lambda step: {"prior_loss": args.prior_loss_weight * (1 - step / args.max_train_steps)},
            describe=lambda model: {"mixing_coefficients": model.mixing_coefficients.tolist()},
        )

    train_dit(RemixDiTModel, args, recipe, num_bases=args.num_bases, num_experts=args.num_experts)


if __name__ == "__main__":
    train_remix(parse_arguments(RemixTrainingArguments))
