"""What a training entry point can be told: dataclasses, filled from a YAML preset and from the command line."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

TRACKERS = ("tensorboard", "wandb", "none")

Arguments = TypeVar("Arguments", bound="DataArguments")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class DataArguments:
    """Images, as training and encoding read them."""

    dataset: str = option(
        "",
        "Folder of images (one sub-folder per class), parquet folder or file (of images, or of latents from "
        "encode_latents.py), or Hub data set id.",
    )
    dataset_split: str = option("train", "Which split of it.")
    image_column: str = option("image", "The data set's column of images.")
    teacher_image_column: str | None = option(
        None, "Its column of the same images for a teacher to look at, for PPAP."
    )
    teacher_image_size: int | None = option(None, "Their size.")
    label_column: str = option("label", "The data set's column of class labels; without it training is unconditional.")
    image_size: int = option(256, "Images are cropped and scaled to this many pixels.")
    image_channels: int = option(3, "1 (grey), 3 (RGB) or 4 (RGBA).")
    dataloader_num_workers: int = option(0, "Worker processes that read images.")
    vae: str | None = option(None, "Folder or Hub id of an AutoencoderKL, to train on its latents.")

    def __post_init__(self):
        self.check_at_least_one("image_size")

    def check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {getattr(self, name)}.")


@dataclass(kw_only=True)
class TrainingArguments(DataArguments):
    """What every system's training shares."""

    validation_dataset: str | None = option(
        None, "Images to report the loss on before and after, as `dataset` has them."
    )
    validation_split: str = option("train", "Which split of it.")
    validation_repeats: int = option(1, "How often each of them is noised, anew, for it.")
    output_dir: str = option("outputs/model", "Where checkpoints, samples and, at the end, `pipeline/` are written.")
    seed: int = option(0, "Of everything random.")
    random_flip: bool = option(True, "Mirror half of the images.")

    # diffusion process
    num_train_timesteps: int = option(1000, "T.")
    beta_schedule: str = option(
        "linear",
        "Of Diffusers' DDPMScheduler: linear, scaled_linear, squaredcos_cap_v2, …; linear0.025 is linear up to that beta.",
    )
    beta_start: float = option(1e-4, "First beta of the linear schedules.")
    beta_end: float = option(0.02, "Last beta of the linear schedules.")
    prediction_type: str = option("epsilon", "What the model predicts: epsilon, sample (x0) or v_prediction.")
    learn_sigma: bool = option(True, "Learn the variance as well.")
    weighting: str = option("constant", "Loss weighting: constant, min_snr_5, p2_1_1, snr, uw, …")
    uncertainty_learning_rate: float = option(0.025, "Of the log-variances of the weighting `uw`.")

    # optimisation
    batch_size: int = option(256, "Images per optimiser step, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = option(1, "Into how many micro-batches a process cuts its share.")
    max_train_steps: int = option(400_000, "Optimiser steps.")
    learning_rate: float = option(1e-4, "Of AdamW.")
    weight_decay: float = option(0.0, "Of AdamW.")
    adam_beta1: float = option(0.9, "Of AdamW.")
    adam_beta2: float = option(0.999, "Of AdamW.")
    lr_scheduler: str = option(
        "constant", "Of transformers' get_scheduler: constant, cosine, cosine_with_min_lr, constant_with_warmup, …"
    )
    min_lr_rate: float = option(0.0, "Share of its start at which `cosine_with_min_lr` ends.")
    lr_warmup_steps: int = option(0, "Steps of linear warm-up, for the schedules that have one.")
    max_grad_norm: float | None = option(None, "Clip the gradients' norm to this.")
    ema_decay: float = option(0.9999, "Of the averaged weights, which are the ones saved; 0 for no averaging.")
    mixed_precision: str | None = option(None, "no, fp16 or bf16; what `accelerate launch` says by default.")
    gradient_checkpointing: bool = option(False, "Trade time for memory.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint's folder, or `latest` in `output_dir`.")

    # what is written along the way
    logging_steps: int = option(50, "Log the loss, its noise bands, learning rate and images per second this often.")
    report_to: str = option("tensorboard", "tensorboard, wandb or none.")
    checkpointing_steps: int = option(10_000, "Write a checkpoint this often.")
    checkpoints_total_limit: int | None = option(2, "Keep this many.")
    pipeline_steps: int = option(
        0, "Save the pipeline as it then is this often, in `pipeline-<step>`; 0 for the end alone."
    )
    sample_steps: int = option(0, "Draw a grid of samples this often; 0 for never.")
    sample_inference_steps: int = option(50, "Denoising steps of those samples.")

    def __post_init__(self):
        super().__post_init__()
        if self.mixed_precision is False:
            self.mixed_precision = "no"  # as YAML reads a bare `no`
        self.check_at_least_one(
            "batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps", "checkpointing_steps",
            "sample_inference_steps", "validation_repeats",
        )  # fmt: skip
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"Expected `checkpoints_total_limit` to be at least 1, but got {self.checkpoints_total_limit}."
            )
        for name in ("pipeline_steps", "sample_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"Expected `{name}` to be 0, for never, or more, but got {getattr(self, name)}.")
        if self.num_train_timesteps < 2:
            raise ValueError(f"Expected `num_train_timesteps` to be at least 2, but got {self.num_train_timesteps}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"Expected `ema_decay` to be in [0, 1), but got {self.ema_decay}.")
        if self.report_to not in TRACKERS:
            raise ValueError(f"Expected `report_to` to be one of {', '.join(TRACKERS)}, but got {self.report_to!r}.")


@dataclass(kw_only=True)
class DiTTrainingArguments(TrainingArguments):
    """A DiT trained from scratch, or further from a checkpoint."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Go on from this model, or from that of a pipeline (folder or Hub id), or an original DiT's file; a Remix-DiT is "
        "made from a DiT, too.",
    )
    preset: str | None = option(
        None, "A published size, DiT-S/2 to DiT-XL/8 (RemixDiT-S/2 …), instead of the next four."
    )
    num_layers: int = option(12, "Blocks.")
    num_attention_heads: int = option(6, "Heads.")
    attention_head_dim: int = option(64, "Channels per head.")
    patch_size: int = option(2, "Side of a patch, in (latent) pixels.")
    class_dropout_prob: float = option(0.1, "How often a label is dropped, for classifier-free guidance.")


def check_expert(expert: str, num_experts: int, resume_from_checkpoint: str | None) -> None:
    """
    Of a training of one of several experts, or of all in turn.

    Raises:
        ValueError: if `expert` is neither 'all' nor an index, or all are to go on from one checkpoint.
    """
    valid = ["all", *map(str, range(num_experts))]
    if expert not in valid:
        raise ValueError(f"Expected `expert` to be one of {', '.join(valid)}, but got {expert!r}.")
    if expert == "all" and num_experts > 1 and resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            "Expected `resume_from_checkpoint` to be 'latest', each expert's own, to go on with all experts, "
            f"but got {resume_from_checkpoint!r}."
        )


def parse_arguments(arguments_class: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """
    Read `--config preset.yaml`, then let the command line override it.

    Args:
        arguments_class: The dataclass to fill.
        argv (`list[str]`, *optional*): The command line; the process's own by default.

    Raises:
        ValueError: if the preset names an unknown argument; the valid ones are listed.
    """
    parser = HfArgumentParser(arguments_class)
    parser.add_argument("--config", help="A YAML preset of the arguments below, which the command line overrides.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_path = config_parser.parse_known_args(argv)[0].config
    if config_path is not None:
        with open(config_path) as file:
            preset = yaml.safe_load(file) or {}
        valid = [field.name for field in dataclasses.fields(arguments_class)]
        unknown = [name for name in preset if name not in valid]
        if unknown:
            raise ValueError(
                f"Expected the preset {config_path} to set {', '.join(valid)}, but got {', '.join(unknown)}."
            )
        parser.set_defaults(**preset)
    return parser.parse_args_into_dataclasses(argv)[0]
