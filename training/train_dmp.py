"""Train prompts for a frozen, converged transformer (DMP, https://arxiv.org/abs/2405.17825).

accelerate launch training/train_dmp.py --config training/presets/dmp_digits.yaml [--any_field value]
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers_dmp import PromptPatch
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.saving.whole import written_whole
from diffusers_dmp.training.arguments import PromptArguments, TrainingArguments, option
from diffusers_dmp.training.base_schedule import check_base_process, check_base_schedule, take_base_shift
from diffusers_dmp.training.data.training_data import load_training_data
from diffusers_dmp.training.dit_family import check_config, load_dit_family
from diffusers_dmp.training.objectives.from_arguments import make_objective
from diffusers_dmp.training.parsing import run_entry_point
from diffusers_dmp.training.prompted import PromptedTransformer, balancing_weights, gate_learning_rates
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.run import Publisher
from diffusers_dmp.training.trainer import make_accelerator, train

METHODS = ("dmp", "prompt_tuning", "full_finetuning")
GATES = {"dmp": "linear", "prompt_tuning": "none"}


@dataclass(kw_only=True)
class DMPTrainingArguments(PromptArguments, TrainingArguments):
    """Prompts, or one of the paper's baselines."""

    pretrained_model_name_or_path: str | None = option(
        None, "The frozen model or pipeline (folder or Hub id), or an original DiT's file."
    )
    method: str = option(
        "dmp", "dmp, or the paper's baselines: prompt_tuning (no gate), full_finetuning (no prompts)."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.pretrained_model_name_or_path is None:
            raise ValueError(
                "Expected `pretrained_model_name_or_path` to name the model that gets prompts, but got None."
            )
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {self.method!r}.")


def train_dmp(args: DMPTrainingArguments, publisher: Publisher | None = None) -> None:
    """Train prompts for the frozen model, or the model itself."""
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    check_base_process(args, args.pretrained_model_name_or_path)
    take_base_shift(args, args.pretrained_model_name_or_path)
    base = load_dit_family(args.pretrained_model_name_or_path)
    check_config(base, args.pretrained_model_name_or_path, data.model_config(args))
    check_base_schedule(args, base, args.pretrained_model_name_or_path, data.vae)
    objective = make_objective(args, base, in_latents=data.vae is not None)
    expert_intervals = getattr(base, "intervals", None)  # of a Remix-DiT
    if args.method == "full_finetuning":
        recipe = TrainingRecipe(expert_intervals=expert_intervals)
        train(accelerator, args, base, objective, data, recipe, publisher)
        accelerator.end_training()
        return

    patch = PromptPatch.for_transformer(
        base,
        num_prompts=args.num_prompts,
        depth=args.depth,
        mode=args.prompt_mode,
        gate=GATES[args.method],
        topk=args.topk,
        base_model_name_or_path=args.pretrained_model_name_or_path,
    )
    patch.attach(base.to(accelerator.device).eval())
    recipe = TrainingRecipe(
        expert_intervals=expert_intervals,
        learning_rates=gate_learning_rates(args, patch),
        auxiliary_weights=lambda step: balancing_weights(args, GATES[args.method]),
        components=lambda model: {"transformer": model.transformer, "prompt_patch": model.patch},
    )
    train(accelerator, args, PromptedTransformer(patch), objective, data, recipe, publisher)
    if accelerator.is_main_process:
        with written_whole(Path(args.output_dir, "patch")) as unfinished:
            shutil.copytree(Path(args.output_dir, "pipeline", "prompt_patch"), unfinished)
    accelerator.end_training()


if __name__ == "__main__":
    run_entry_point(DMPTrainingArguments, with_hub(train_dmp))
