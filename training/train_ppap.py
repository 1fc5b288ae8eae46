"""Train the experts that guide by an off-the-shelf vision model (PPAP, https://arxiv.org/abs/2212.05973).

accelerate launch training/train_ppap.py --config training/presets/ppap_digits.yaml [--any_field value]
"""

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.diffusion.process import NoiseProcess
from diffusers_dmp.guidance.experts import METHODS
from diffusers_dmp.hub.pushing import with_hub
from diffusers_dmp.training.arguments import (
    BoundaryArguments,
    ExpertArguments,
    NoiseArguments,
    ProcessArguments,
    SharedTrainingArguments,
    option,
)
from diffusers_dmp.training.conditions import no_conditions
from diffusers_dmp.training.data.training_data import load_training_data
from diffusers_dmp.training.experts import ExpertTraining, train_experts
from diffusers_dmp.training.guidance_experts import (
    WEIGHTS_NAME,
    expert_intervals,
    make_experts,
    save_expert,
    save_together,
)
from diffusers_dmp.training.objectives import distillation
from diffusers_dmp.training.objectives.from_arguments import make_noising, noise_record
from diffusers_dmp.training.objectives.objective import Objective
from diffusers_dmp.training.objectives.shifts import BY_RESOLUTION
from diffusers_dmp.training.parsing import renamed, run_entry_point
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.trainer import make_accelerator

NUM_EXPERTS = 5  # the paper's


@renamed(network_image_size="image_processor_size")
@dataclass(kw_only=True)
class PPAPTrainingArguments(BoundaryArguments, ExpertArguments, ProcessArguments, SharedTrainingArguments):
    """The experts of a vision model that guide."""

    # fields of 0.1, which its `training_arguments.yaml` have
    without_effect: ClassVar[tuple[str, ...]] = (
        "learn_sigma", "prediction_type", "weighting", "uncertainty_learning_rate",
    )  # fmt: skip

    base_model: str = option(
        "", "Folder or Hub id of the transformers model: classifier, depth, segmentation, CLIP or SigLIP."
    )
    method: str = option(
        "ppap", "ppap (no labels), or the paper's baselines, on labels: multi_experts (whole copies), finetune (one)."
    )
    num_experts: int = option(  # None until `_resolve_intervals`
        None, "Number of experts, with intervals of equally many timesteps; 5, or as many as boundaries make."
    )
    rank: int = option(16, "Rank of LoRA.")
    lora_alpha: float = option(8.0, "LoRA is scaled by this over its rank.")
    target_modules: list[str] = option([], "Endings of the names of layers that get LoRA; the paper's by default.")
    image_processor_size: int | None = option(
        None,
        "Scale images to this many pixels, the shorter side, for the network; by default as its image processor does, its "
        "preprocessor_config.json.",
    )
    image_mean: list[float] = option(
        [],
        "Mean of each channel of the network's training images, in [0, 1]; by default as in its preprocessor_config.json.",
    )
    image_std: list[float] = option([], "Standard deviation of each channel, likewise.")

    # other defaults, the paper's
    density: str = option(
        "uniform", "For flow: how often which noise level is trained: uniform, logit_normal, mode or cosmap."
    )
    shift: str | None = option(None, "For flow: a shift of the density towards the noise, such as 3; by default 1.")
    weight_decay: float = option(0.05, "Weight decay of AdamW.")
    lr_scheduler: str = option("linear", "Schedule of transformers' get_scheduler.")
    ema_decay: float = option(0.0, "Decay of the averaged weights; 0 for no averaging.")

    def __post_init__(self):
        super().__post_init__()
        self._check_noise()
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {self.method!r}.")
        self._resolve_intervals()
        self.check_at_least_one("rank")
        if self.image_processor_size is not None:
            self.check_at_least_one("image_processor_size")
        self.check_expert(self.num_experts)
        for name in ("sample_steps", "pipeline_steps"):
            if getattr(self, name):
                raise ValueError(f"Expected `{name}` to be 0, as nothing is sampled, but got {getattr(self, name)}.")
        if self.compile:
            raise ValueError(
                "Expected `compile` to be false for PPAP, which trains a little of a network of others, but got true."
            )
        if self.vae is not None:
            raise ValueError(f"Expected no `vae`, as the experts look at images, but got {self.vae!r}.")
        if (self.teacher_image_column is None) != (self.teacher_image_size is None):
            raise ValueError(
                "Expected `teacher_image_column` and `teacher_image_size` both or neither, but got "
                f"{self.teacher_image_column!r} and {self.teacher_image_size}."
            )
        if self.teacher_image_column is not None and self.random_flip:
            raise ValueError(
                "Expected `random_flip` to be false where the teacher has images of its own, but got true."
            )

    def _resolve_intervals(self) -> None:
        """Set the number of experts, and check that the intervals are given in one way and fit the noise."""
        given = self.given_boundaries
        if len(given) > 1:
            raise ValueError(f"Expected one kind of boundaries at most, but got {' and '.join(given)}.")
        if self.method == "finetune":
            if given:
                raise ValueError(f"Expected no `{given[0]}` for the method finetune, which trains one network.")
            self.num_experts = 1
        if self.sigma_boundaries and self.objective != "flow":
            raise ValueError(
                "Expected `objective` to be flow where `sigma_boundaries` is set, but got ddpm; `snr_boundaries` and "
                "`timestep_boundaries` go with both."
            )
        if self.num_experts is None:
            self.num_experts = self.count_experts() if given else NUM_EXPERTS
        if given and self.num_experts != self.count_experts():
            raise ValueError(
                f"Expected `num_experts` to be the {self.count_experts()} that `{given[0]}` makes, but got {self.num_experts}."
            )
        self.check_at_least_one("num_experts")
        expert_intervals(self)  # raises where boundaries and noise do not fit

    def _check_noise(self) -> None:
        """Check the noise process, and that nothing is set that it does not have."""
        self.check_process()
        if self.shift == BY_RESOLUTION:
            raise ValueError(
                f"Expected `shift` to be a number, as the experts' images have no tokens, but got {self.shift!r}."
            )
        for field in fields(NoiseArguments):
            value = getattr(self, field.name)
            if self.objective == "flow" and field.name.startswith("beta") and value != field.default:
                raise ValueError(
                    f"Expected `{field.name}` to be left at {field.default} for flow matching, whose noise has no betas, but "
                    f"got {value!r}."
                )


def train_ppap(args: PPAPTrainingArguments) -> None:
    """Train one expert, or all in turn; when all are there, put them together."""
    if not args.base_model:
        raise ValueError("Expected `base_model` to be the folder or Hub id of a network, but got nothing.")
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    experts = make_experts(args)
    objective = make_objective(args, experts, has_labels=data.label_names is not None)
    experts.to(accelerator.device)
    folders = [Path(args.output_dir, f"expert_{expert}") for expert in range(args.num_experts)]

    def prepare(expert: int) -> ExpertTraining:
        recipe = TrainingRecipe(
            denoiser=distillation.StudentCall(data.sample_shape),
            conditions=no_conditions,
            expert_intervals=experts.intervals,
            expert=expert,
            save=lambda student: save_expert(experts, expert, folders[expert]),
        )
        return ExpertTraining(model=distillation.ExpertStudent(experts, expert), objective=objective, recipe=recipe)

    # some networks have layers that they never call, as DPT its first fusion layer's first residual one
    chosen = args.chosen_experts(args.num_experts)
    train_experts(args, data, folders, chosen, prepare, find_unused_parameters=True)
    if accelerator.is_main_process and all((folder / WEIGHTS_NAME).exists() for folder in folders):
        save_together(experts, folders, Path(args.output_dir))
    accelerator.end_training()


def make_objective(args: PPAPTrainingArguments, experts: GuidanceExperts, has_labels: bool) -> Objective:
    """What the experts learn from: labels, for the baselines of a classifier, or else the network itself."""
    noising = make_noising(args, NoiseProcess.from_record(noise_record(args)).scheduler)
    is_classifier = experts.config.base_model_class.endswith("ForImageClassification")
    if args.method != "ppap" and has_labels and is_classifier:
        return distillation.LabelObjective(noising)
    has_teacher_images = args.teacher_image_column is not None
    return distillation.DistillationObjective(noising, copy.deepcopy(experts), has_teacher_images)


if __name__ == "__main__":
    run_entry_point(PPAPTrainingArguments, with_hub(train_ppap, along_the_way=False))
