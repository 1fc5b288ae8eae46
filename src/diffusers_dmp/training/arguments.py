"""The arguments of the training entry points: groups of dataclass fields; `parsing.py` fills them.

An entry point has one dataclass, which inherits the groups that it needs. A model's own arguments are typed in that
dataclass alone: [`model_arguments`] finds those that the model's constructor takes.
"""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

from .data.decoding import check_background
from .data.fitting import FITS
from .fields import NumberChecks as NumberChecks
from .fields import option as option
from .noise_arguments import BOUNDARIES as BOUNDARIES
from .noise_arguments import OBJECTIVES as OBJECTIVES
from .noise_arguments import BoundaryArguments as BoundaryArguments
from .noise_arguments import NoiseArguments as NoiseArguments
from .noise_arguments import ObjectiveArguments as ObjectiveArguments
from .noise_arguments import ProcessArguments as ProcessArguments
from .optimisers import check_lr_schedule, check_optimiser
from .parsing import parse_arguments as parse_arguments  # its former place

TRACKERS = ("tensorboard", "wandb", "none")

Arguments = TypeVar("Arguments")


@dataclass(kw_only=True)
class SourceArguments:
    """Where data are read from."""

    dataset: str = option(
        "",
        "Folder of images (one sub-folder per class), parquet folder or file (of images, or of latents from "
        "encode_latents.py), or Hub data set id.",
    )
    dataset_split: str = option("train", "Split of `dataset`.")
    dataloader_num_workers: int | None = option(
        None,
        "Worker processes that read data, for each process that trains; by default one for each core but one on an accelerator, at "
        "most 16, and none on a CPU, where the model needs the cores.",
    )


@dataclass(kw_only=True)
class DataArguments(SourceArguments, NumberChecks):
    """The images, as training and encoding read them."""

    image_column: str = option("image", "Column of images in the data set.")
    teacher_image_column: str | None = option(
        None, "For PPAP: column of the same images, in the resolution that the teacher sees."
    )
    teacher_image_size: int | None = option(None, "For PPAP: size of the teacher's images in pixels.")
    label_column: str = option("label", "Column of class labels in the data set; none for unconditional training.")
    image_size: int = option(256, "Images are cropped and scaled to this many pixels.")
    image_channels: int = option(3, "1 (grey), 3 (RGB) or 4 (RGBA).")
    image_fit: str = option("crop", "How an image becomes a square: crop (its centre) or pad (with the background).")
    background: str = option(
        "white", "Colour behind transparent pixels, unless there are 4 channels, and of padding: a name or #rrggbb."
    )
    skip_unreadable: bool = option(False, "Leave out the images that cannot be read, and list them.")
    vae: str | None = option(None, "Folder or Hub id of an AutoencoderKL, for training on its latents.")

    def __post_init__(self):
        self.check_at_least_one("image_size")
        if self.image_fit not in FITS:
            raise ValueError(f"Expected `image_fit` to be one of {', '.join(FITS)}, but got {self.image_fit!r}.")
        check_background(self.background)


@dataclass(kw_only=True)
class OptimisationArguments:
    """Batches, optimiser, learning rate, averaged weights and precision."""

    batch_size: int = option(256, "Images per optimiser step, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = option(
        1, "Number of micro-batches that a process cuts its images of a step into."
    )
    max_train_steps: int = option(400_000, "Optimiser steps.")
    optimizer: str = option(
        "adamw",
        "adamw; adamw_8bit (package bitsandbytes); prodigy (prodigyopt), with `learning_rate` 1; schedule_free_adamw "
        "(schedulefree), with `ema_decay` 0.",
    )
    learning_rate: float = option(1e-4, "Learning rate of AdamW.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    adam_beta1: float = option(0.9, "β1 of AdamW.")
    adam_beta2: float = option(0.999, "β2 of AdamW.")
    lr_scheduler: str = option(
        "constant",
        "Schedule of transformers' get_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts, "
        "cosine_with_min_lr, cosine_warmup_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay.",
    )
    min_lr_rate: float = option(
        0.0,
        "For cosine_with_min_lr, cosine_warmup_with_min_lr and warmup_stable_decay: the final learning rate as a share of "
        "the initial one.",
    )
    lr_warmup_steps: int = option(0, "Steps of linear warm-up, for all schedules but constant.")
    lr_num_cycles: int = option(1, "For cosine_with_restarts: how many times the learning rate falls.")
    lr_power: float = option(1.0, "For polynomial: the power of the decay.")
    lr_decay_steps: int = option(0, "For warmup_stable_decay: how many of the last steps the learning rate falls in.")
    max_grad_norm: float | None = option(None, "Clip the norm of the gradients to this; no clipping by default.")
    ema_decay: float = option(0.9999, "Decay of the averaged weights, which are the ones saved; 0 for no averaging.")
    mixed_precision: str | None = option(None, "no, fp16 or bf16; by default the setting of `accelerate launch`.")
    compile: bool = option(
        False,
        "Compile the model, its blocks where they repeat: the first step takes a minute or so, the others less time.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    deterministic: bool = option(
        False, "Use deterministic algorithms only, so that a resumed run is repeated bit for bit on a GPU too; slower."
    )


@dataclass(kw_only=True)
class OutputArguments:
    """What a training writes, and when."""

    output_dir: str = option("outputs/model", "Where checkpoints, samples and, at the end, `pipeline/` are written.")
    resume_from_checkpoint: str | None = option(
        None, "Folder of a checkpoint to resume from, or `latest` for the last one in `output_dir`."
    )
    logging_steps: int = option(
        50, "Every n-th step, log the loss, the loss by timestep, learning rate and images per second."
    )
    report_to: str = option("tensorboard", "Where to log: tensorboard, wandb or none.")
    checkpointing_steps: int = option(10_000, "Write a checkpoint every n-th step, and after the last one.")
    checkpoints_total_limit: int | None = option(2, "How many checkpoints to keep.")
    pipeline_steps: int = option(
        0, "Save the current pipeline every n-th step, in `pipeline-<step>`; 0 to save it at the end only."
    )
    sample_steps: int = option(0, "Generate a grid of samples every n-th step; 0 for never.")
    sample_inference_steps: int = option(50, "Denoising steps of those samples.")
    push_to_hub: bool = option(
        False, "Upload the pipeline to the Hugging Face Hub at each checkpoint or saved pipeline, and at the end."
    )
    hub_model_id: str | None = option(
        None,
        "The repository of `push_to_hub`, user/name; by default the name of `output_dir`, of the user of the token.",
    )
    hub_private_repo: bool = option(False, "Let only its owners see that repository.")
    hub_license: str | None = option(
        None, "The licence of the weights, such as apache-2.0, which `push_to_hub` needs."
    )


@dataclass(kw_only=True)
class LoopArguments(OutputArguments, OptimisationArguments, SourceArguments, NumberChecks):
    """The arguments that the training loop reads, whatever it trains on."""

    validation_dataset: str | None = option(
        None,
        "Held-out images, in any form that `dataset` can have; the loss on them is reported before and after.",
    )
    validation_split: str = option("train", "Split of `validation_dataset`.")
    validation_repeats: int = option(1, "How many times each held-out image is noised, each time differently.")
    validation_steps: int = option(
        0,
        "Validate every n-th step as well, and keep the checkpoint with the lowest loss beside the last ones; 0 for never.",
    )
    seed: int = option(0, "Seed of all random numbers.")
    random_flip: bool = option(True, "Mirror half of the images.")

    def __post_init__(self):
        if self.mixed_precision is False:
            self.mixed_precision = "no"  # YAML reads a bare `no` as false
        self.check_at_least_one(
            "batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps", "checkpointing_steps",
            "sample_inference_steps", "validation_repeats",
        )  # fmt: skip
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"Expected `checkpoints_total_limit` to be at least 1, but got {self.checkpoints_total_limit}."
            )
        for name in ("pipeline_steps", "sample_steps", "validation_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"Expected `{name}` to be 0, for never, or more, but got {getattr(self, name)}.")
        if self.validation_steps and self.validation_dataset is None:
            raise ValueError(
                f"Expected `validation_steps` to be 0 without a `validation_dataset`, but got {self.validation_steps}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"Expected `ema_decay` to be in [0, 1), but got {self.ema_decay}.")
        if self.push_to_hub and self.hub_license is None:
            raise ValueError(
                "Expected `hub_license` to be the licence of the weights for `push_to_hub`, such as apache-2.0, mit or "
                "cc-by-nc-4.0, but got None."
            )
        for name in ("hub_model_id", "hub_private_repo", "hub_license"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(
                    f"Expected `push_to_hub` to be true where `{name}` is set, but got false and {getattr(self, name)!r}."
                )
        check_optimiser(self)
        check_lr_schedule(self, {field.name: field.default for field in dataclasses.fields(OptimisationArguments)})
        if self.report_to not in TRACKERS:
            raise ValueError(f"Expected `report_to` to be one of {', '.join(TRACKERS)}, but got {self.report_to!r}.")

    def samples_in_words(self, count: int) -> str:
        """Say what a number of samples are."""
        return f"{count} images"


@dataclass(kw_only=True)
class SharedTrainingArguments(LoopArguments, NoiseArguments, DataArguments):
    """The arguments that every training on images has."""

    color_jitter: float = option(
        0.0, "Change brightness, contrast and saturation of each image by random factors, 1 - this to 1 + this."
    )
    balance_classes: bool = option(
        False,
        "Train on all classes equally often, however many images each has; an image's turn comes the more often "
        "the fewer its class has.",
    )
    class_repeats: list[str] = option(
        [],
        "How many times an epoch has the images of a class, for those that it has more than once: bus=3 'two words'=2 …",
    )

    def __post_init__(self):
        DataArguments.__post_init__(self)
        LoopArguments.__post_init__(self)
        if self.num_train_timesteps < 2:
            raise ValueError(f"Expected `num_train_timesteps` to be at least 2, but got {self.num_train_timesteps}.")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"Expected `color_jitter` to be in [0, 1], but got {self.color_jitter}.")
        if self.color_jitter and self.teacher_image_column is not None:
            raise ValueError(
                "Expected `color_jitter` to be 0 where the teacher has images of its own, but got "
                f"{self.color_jitter}."
            )
        self.repeats_by_class()
        if self.class_repeats and self.balance_classes:
            raise ValueError(
                "Expected either `class_repeats` or `balance_classes`, which decides how often a class comes, but got both."
            )

    def samples_in_words(self, count: int) -> str:
        """Say what a number of samples are."""
        return f"{count} images of {self.image_size} pixels"

    def repeats_by_class(self) -> dict[str, int]:
        """
        Read `class_repeats`: the number of times that an epoch has the images of a class, by the class's name.

        Raises:
            ValueError: if an entry is not a name, = and a number from 1 on, or a name comes twice.
        """
        repeats: dict[str, int] = {}
        for entry in map(str, self.class_repeats):
            name, _, number = entry.rpartition("=")
            if not name or not number.isdecimal() or int(number) < 1 or name in repeats:
                raise ValueError(
                    "Expected `class_repeats` to have each class's name once, with = and a number from 1 on, such as "
                    f"bus=3, but got {entry!r}."
                )
            repeats[name] = int(number)
        return repeats


@dataclass(kw_only=True)
class TrainingArguments(ObjectiveArguments, SharedTrainingArguments):
    """The arguments that every training of a denoiser has."""

    def __post_init__(self):
        super().__post_init__()
        self.resolve_objective()


@dataclass(kw_only=True)
class PromptArguments:
    """Prompts for a frozen transformer (DMP)."""

    prompt_mode: str = option("add", "add prompts to the image tokens, or prepend them.")
    num_prompts: int | None = option(
        None, "Number of prompts, if they are prepended; by default as many as image tokens."
    )
    depth: int | None = option(None, "Number of first blocks that get prompts; by default all.")
    topk: float = option(1.0, "Share of the prompts that the gate selects.")
    gate_learning_rate: float = option(
        1e-3, "Learning rate of the gate and its noise; `learning_rate` is that of the prompts."
    )
    importance_loss_weight: float = option(1.0, "Weight of the loss that balances the prompts' weights.")
    load_loss_weight: float = option(
        1.0, "Weight of the loss that balances how often prompts are selected, for `topk` below 1."
    )


@dataclass(kw_only=True)
class RoutingArguments:
    """Denoising Task Routing (DTR)."""

    sharing_ratio: float = option(0.8, "Share of the channels that a timestep uses, in (0, 1].")
    routing_alpha: float = option(4.0, "The larger, the more the channel windows crowd towards the clean timesteps.")


@dataclass(kw_only=True)
class DiTTrainingArguments(TrainingArguments):
    """A DiT that is trained from scratch or from a checkpoint."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "Start from the weights of this model or pipeline (folder or Hub id), or of an original DiT's file; a Remix-DiT "
        "can start from a DiT, too.",
    )
    preset: str | None = option(
        None, "A published size, DiT-S/2 to DiT-XL/8 (RemixDiT-S/2 …), instead of the next four arguments."
    )
    num_layers: int = option(12, "Blocks.")
    num_attention_heads: int = option(6, "Attention heads.")
    attention_head_dim: int = option(64, "Channels per head.")
    patch_size: int = option(2, "Side of the squares of (latent) pixels that become tokens.")
    class_dropout_prob: float = option(0.1, "How often a label is dropped, for classifier-free guidance.")


@dataclass(kw_only=True)
class ExpertArguments(OutputArguments):
    """The choice of an expert, for systems whose experts are models of their own."""

    expert: str = option("all", "The expert to train: 0 for the cleanest images, 1, …, or all of them in turn.")

    def check_expert(self, num_experts: int) -> None:
        """
        Check `expert`, and turn the number that a preset may have into a string.

        Raises:
            ValueError: if `expert` is neither 'all' nor an index, or if all experts are to resume from one checkpoint.
        """
        self.expert = str(self.expert)
        valid = ["all", *map(str, range(num_experts))]
        if self.expert not in valid:
            raise ValueError(f"Expected `expert` to be one of {', '.join(valid)}, but got {self.expert!r}.")
        if self.push_to_hub and self.expert != "all":
            raise ValueError(
                "Expected `expert` to be 'all' for `push_to_hub`, which uploads all experts together, but got "
                f"{self.expert!r}."
            )
        if self.expert == "all" and num_experts > 1 and self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                "Expected `resume_from_checkpoint` to be 'latest', each expert's own, to go on with all experts, "
                f"but got {self.resume_from_checkpoint!r}."
            )

    def chosen_experts(self, num_experts: int) -> list[int]:
        """The indices of the experts to train."""
        return list(range(num_experts)) if self.expert == "all" else [int(self.expert)]


def model_arguments(model_class: type, args: Any, without: type | None = None) -> dict[str, Any]:
    """
    The arguments of a model's constructor that a dataclass of arguments has a field for.

    Args:
        model_class (`type`): The model's class. A constructor with `**kwargs` takes its base class's arguments as well.
        args: The dataclass.
        without (`type`, *optional*): Leave out the fields of this dataclass.

    Returns:
        `dict[str, Any]`: The fields' values, by name.
    """
    names: set[str] = set()
    for base in model_class.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    left_out = set() if without is None else {field.name for field in dataclasses.fields(without)}
    fields = [field.name for field in dataclasses.fields(args) if field.name not in left_out]
    return {name: getattr(args, name) for name in fields if name in names}
