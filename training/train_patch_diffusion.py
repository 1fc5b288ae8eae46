"""Train patchified UNets, one for each stretch of signal-to-noise ratios (Patch Diffusion, https://arxiv.org/abs/2207.04316).

accelerate launch training/train_patch_diffusion.py --config training/presets/patch_digits.yaml [--any_field value]
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_dmp import NoiseIntervals, PatchedUNet2DModel, SNRSplitPipeline
from diffusers_dmp.training.arguments import TrainingArguments, check_expert, option, parse_arguments
from diffusers_dmp.training.checkpoints import expect_no_checkpoints
from diffusers_dmp.training.dit import TrainingData, load_training_data
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.trainer import make_accelerator, make_scheduler, train

SIZES = ("patch_size", "model_channels", "channel_multipliers", "layers_per_block", "attention_levels",
         "attention_head_dim", "dropout")  # fmt: skip


def several(default: list, help: str):
    """A field of several values."""
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass(kw_only=True)
class PatchDiffusionTrainingArguments(TrainingArguments):
    prediction_type: str = option("sample", "What the models predict: sample (x0), epsilon or v_prediction.")
    weighting: str = option("sqrt_snr", "Loss weighting: sqrt_snr, snr, snr+1, truncated_snr, p2, …")

    snr_boundaries: list[float] = several(
        [], "Descending signal-to-noise ratios between the experts; none for one model."
    )
    expert: str = option("all", "Which to train, 0 being that for the cleanest images; all makes the whole pipeline.")

    patch_size: int = option(4, "Side of a patch, in pixels.")
    model_channels: int = option(128, "The width that is multiplied.")
    channel_multipliers: list[float] = several([1, 1, 2, 2], "Of each level, the finest first.")
    layers_per_block: int = option(2, "Residual blocks of each level.")
    attention_levels: list[int] = several([2, 3], "Which levels attend, 0 being the finest.")
    attention_head_dim: int = option(64, "Channels per head.")
    dropout: float = option(0.0, "Of the residual blocks.")
    class_dropout_prob: float = option(0.1, "How often a label is dropped, for classifier-free guidance.")

    def __post_init__(self):
        super().__post_init__()
        self.expert = str(self.expert)  # a preset's bare 0 is a number
        check_expert(self.expert, len(self.snr_boundaries) + 1, self.resume_from_checkpoint)


def train_patch_diffusion(args: PatchDiffusionTrainingArguments) -> None:
    accelerator = make_accelerator(args)
    data = load_training_data(accelerator, args)
    intervals = NoiseIntervals.from_snr(args.snr_boundaries, make_scheduler(args, in_latents=data.vae is not None))
    experts = range(intervals.num_experts) if args.expert == "all" else [int(args.expert)]
    folders = [expert_folder(args, expert) for expert in range(intervals.num_experts)]
    if args.resume_from_checkpoint is None:
        for expert in experts:  # before any trains
            expect_no_checkpoints(folders[expert])
    for expert in experts:
        own_args = dataclasses.replace(args, output_dir=str(folders[expert]))
        recipe = TrainingRecipe(expert_intervals=intervals, expert=expert)
        model = new_unet(args, data, expert)
        train(make_accelerator(own_args), own_args, model, recipe=recipe, **data.for_training)
    if len(experts) > 1 and accelerator.is_main_process:
        parts = [DiffusionPipeline.from_pretrained(folder / "pipeline") for folder in folders]
        pipeline = SNRSplitPipeline.from_pipelines(parts, args.snr_boundaries)
        pipeline.save_pretrained(Path(args.output_dir, "pipeline"))
        summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in folders]
        totals = {name: sum(summary[name] for summary in summaries) for name in ("steps", "train_seconds")}
        Path(args.output_dir, "training_summary.json").write_text(json.dumps(totals | {"experts": summaries}) + "\n")
    accelerator.end_training()


def expert_folder(args: PatchDiffusionTrainingArguments, expert: int) -> Path:
    """Where an expert is trained: the output's own folder, if it is the only one."""
    return Path(args.output_dir, f"expert_{expert}") if args.snr_boundaries else Path(args.output_dir)


def new_unet(args: PatchDiffusionTrainingArguments, data: TrainingData, expert: int) -> PatchedUNet2DModel:
    """A model that says which stretch of noise it is trained on."""
    config = data.config | {name: getattr(args, name) for name in SIZES}
    if data.label_names is None:
        config["num_classes"] = None
    return PatchedUNet2DModel(
        **config,
        class_dropout_prob=args.class_dropout_prob if data.label_names else 0.0,
        prediction_type=args.prediction_type,
        snr_interval=[None, *args.snr_boundaries, None][expert : expert + 2],
    )


if __name__ == "__main__":
    train_patch_diffusion(parse_arguments(PatchDiffusionTrainingArguments))
