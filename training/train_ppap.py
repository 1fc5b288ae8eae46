"""Train the experts that guide by an off-the-shelf vision model (PPAP, https://arxiv.org/abs/2212.05973).

accelerate launch training/train_ppap.py --config training/presets/ppap_digits.yaml [--any_field value]
"""

import copy
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.guidance.experts import METHODS
from diffusers_dmp.training.arguments import TrainingArguments, check_expert, option, parse_arguments
from diffusers_dmp.training.checkpoints import expect_no_checkpoints
from diffusers_dmp.training.dit import load_training_data
from diffusers_dmp.training.objectives.distillation import DistillationObjective, ExpertStudent, LabelObjective
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.trainer import make_accelerator, train

WEIGHTS_NAME = "expert.safetensors"


@dataclass(kw_only=True)
class PPAPTrainingArguments(TrainingArguments):
    base_model: str = option("", "Folder or Hub id of the transformers model: classifier, depth or segmentation.")
    method: str = option(
        "ppap",
        "ppap (no labels), or the paper's baselines, on labels: multi_experts (whole copies), finetune (one model).",
    )
    num_experts: int = option(5, "Into how many equal stretches the timesteps are cut.")
    expert: str = option("all", "Which to train, 0 being that for the cleanest images; the last one makes the bundle.")
    rank: int = option(16, "Of LoRA.")
    lora_alpha: float = option(8.0, "LoRA counts this over its rank.")
    target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Endings of the layers that get LoRA; the paper's by default."}
    )
    network_image_size: int | None = option(
        None, "Scale images to this for the network; by default to what its image processor says."
    )
    learn_sigma: bool = option(False, "Not used: nothing is denoised.")

    # the paper's
    weight_decay: float = option(0.05, "Of AdamW.")
    lr_scheduler: str = option("linear", "Of transformers' get_scheduler.")
    ema_decay: float = option(0.0, "Of averaged weights; 0 for none.")

    def __post_init__(self):
        super().__post_init__()
        self.expert = str(self.expert)  # a preset's bare 0 is a number
        if self.method not in METHODS:
            raise ValueError(f"Expected `method` to be one of {', '.join(METHODS)}, but got {self.method!r}.")
        if self.method == "finetune":
            self.num_experts = 1
        self.check_at_least_one("num_experts", "rank")
        check_expert(self.expert, self.num_experts, self.resume_from_checkpoint)
        for name in ("sample_steps", "pipeline_steps"):
            if getattr(self, name):
                raise ValueError(f"Expected `{name}` to be 0, as nothing is sampled, but got {getattr(self, name)}.")
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


def train_ppap(args: PPAPTrainingArguments) -> None:
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    experts = make_experts(args)
    teacher = copy.deepcopy(experts)
    is_classifier = experts.config.base_model_class.endswith("ForImageClassification")
    if args.method == "ppap" or data.label_names is None or not is_classifier:
        objective = DistillationObjective(teacher, args.num_train_timesteps, args.teacher_image_column is not None)
    else:
        objective = LabelObjective(args.num_train_timesteps)
    experts.to(accelerator.device)

    chosen = range(args.num_experts) if args.expert == "all" else [int(args.expert)]
    folders = [Path(args.output_dir, f"expert_{expert}") for expert in range(args.num_experts)]
    if args.resume_from_checkpoint is None:
        for expert in chosen:  # before any trains
            expect_no_checkpoints(folders[expert])
    for expert in chosen:
        own_args = dataclasses.replace(args, output_dir=str(folders[expert]))
        student = ExpertStudent(experts, expert, args.image_channels, args.image_size)
        recipe = TrainingRecipe(
            expert_intervals=experts.intervals,
            expert=expert,
            objective=objective,
            save=lambda student: save_expert(experts, student.expert, folders[student.expert]),
        )
        # some networks have layers that they never call, as DPT its first fusion layer's first residual one
        own_accelerator = make_accelerator(own_args, find_unused_parameters=True)
        train(own_accelerator, own_args, student, recipe=recipe, **data.for_training)
    if accelerator.is_main_process and all((folder / WEIGHTS_NAME).exists() for folder in folders):
        bundle(experts, folders, Path(args.output_dir))
    accelerator.end_training()


def make_experts(args: PPAPTrainingArguments) -> GuidanceExperts:
    """Untrained ones."""
    settings = {
        "num_experts": args.num_experts,
        "num_train_timesteps": args.num_train_timesteps,
        "method": args.method,
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "target_modules": args.target_modules or None,
    }
    if args.network_image_size is not None:
        settings["image_size"] = args.network_image_size
    return GuidanceExperts.from_base(args.base_model, **settings)


def save_expert(experts: GuidanceExperts, expert: int, folder: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in experts.expert_tensors(expert).items()}
    save_file(tensors, folder / WEIGHTS_NAME)


def bundle(experts: GuidanceExperts, folders: list[Path], output_dir: Path) -> None:
    """Put all experts together, whichever process trained them when, with a summary of their training."""
    experts.load_expert_tensors(
        {
            f"expert_{expert}.{name}": tensor
            for expert, folder in enumerate(folders)
            for name, tensor in load_file(folder / WEIGHTS_NAME).items()
        }
    )
    experts.save_pretrained(output_dir / "experts")
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in folders]
    totals = {name: sum(summary[name] for summary in summaries) for name in ("steps", "train_seconds")}
    (output_dir / "training_summary.json").write_text(json.dumps(totals | {"experts": summaries}) + "\n")


if __name__ == "__main__":
    train_ppap(parse_arguments(PPAPTrainingArguments))
