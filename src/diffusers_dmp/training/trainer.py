"""What surrounds the training loop: processes, averaged weights, checkpoints, logs, samples, and the finished pipeline."""

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import nn
from transformers import get_scheduler

from ..pipelines import ClassConditionalPipeline
from ..saving.whole import written_whole
from .arguments import TrainingArguments
from .checkpoints import resume, save_checkpoint
from .data.images import GlobalBatchSampler, endless_batches, training_items
from .loop import training_steps
from .loss_log import ExpertCounts, LossLog, trackable
from .objectives.ddpm import DiffusionObjective
from .recipe import TrainingRecipe
from .validation import validation_loss

MIN_LR_SCHEDULE = "cosine_with_min_lr"  # the one that takes `min_lr_rate`

logger = logging.getLogger(__name__)


def make_accelerator(args: TrainingArguments, find_unused_parameters: bool = False) -> Accelerator:
    """
    The processes, devices and trackers of a training.

    Args:
        args ([`TrainingArguments`]): Everything that can be set.
        find_unused_parameters (`bool`): Whether the model may have parameters that its output does not depend on.

    Raises:
        ValueError: if the tracker that `report_to` names is not installed.
    """
    if args.report_to != "none" and LoggerType(args.report_to) not in get_available_trackers():
        raise ValueError(f"Expected `report_to` to be an installed tracker, but got {args.report_to!r}, which is not.")
    accelerator = Accelerator(
        # without this, several processes on CPUs would each train alone
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
        kwargs_handlers=[
            # buffers are the same tables everywhere
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
        ],
    )
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "The launcher prepared for several processes, but started one: on CPUs, `accelerate launch` wants "
            "`--multi_gpu` beside `--num_processes`."
        )
    return accelerator


def train(
    accelerator: Accelerator,
    args: TrainingArguments,
    model: nn.Module,
    dataset: datasets.Dataset,
    label_names: list[str] | None,
    vae: AutoencoderKL | None = None,
    recipe: TrainingRecipe | None = None,
    validation: datasets.Dataset | None = None,
) -> None:
    """
    Train `model` and save it, as a pipeline in `args.output_dir/pipeline` if `recipe` does not say how. Another training may follow; after the last one,
    the caller's `accelerator.end_training()` parts the processes.

    Args:
        accelerator (`Accelerator`): As [`make_accelerator`] returns it.
        args ([`TrainingArguments`]): Everything that can be set.
        model (`nn.Module`): A DiT, on the CPU; or what stands for one, with its `config`, while `recipe.components` tells
            what to make a pipeline of.
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        label_names (`list[str]`, *optional*): The classes' names; None for unconditional training.
        vae ([`AutoencoderKL`], *optional*): To train on its latents.
        recipe ([`TrainingRecipe`], *optional*): What the system trains differently.
        validation (`datasets.Dataset`, *optional*): Held out; the loss on it before and after goes into the summary.

    Raises:
        ValueError: if the batch does not divide among processes, accumulation steps and timestep clusters, or an
            argument is unknown.
    """
    recipe = recipe or TrainingRecipe()

    # 1. Objective and process
    scheduler = make_scheduler(args, in_latents=vae is not None)
    variance_type = getattr(model, "variance_type", "learned_range") if args.learn_sigma else None
    objective = recipe.objective or DiffusionObjective(scheduler, args.weighting, variance_type)
    check_batch_size(accelerator, args, objective)
    if recipe.expert_intervals is not None and objective.uncertainty is not None:
        raise ValueError(
            f"Expected `weighting` to leave the choice of timesteps to the experts, but got {args.weighting!r}."
        )

    # 2. Model and optimiser
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if vae is not None:
        vae.to(accelerator.device)
    optimizer = make_optimizer(args, model, objective, recipe.learning_rates)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        scheduler_specific_kwargs={"min_lr_rate": args.min_lr_rate} if args.lr_scheduler == MIN_LR_SCHEDULE else {},
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if objective.uncertainty is None:
        objective.to(accelerator.device)
    else:  # it learns, too
        objective = accelerator.prepare(objective)
    accelerator.register_for_checkpointing(lr_scheduler)
    expert_counts = None
    if recipe.expert_intervals is not None:
        expert_counts = ExpertCounts(recipe.expert_intervals)
        accelerator.register_for_checkpointing(expert_counts)
    ema = None
    if args.ema_decay:
        # Deviation from reference: Diffusers' EMAModel warms its decay up, so that short runs are averaged sensibly, too
        ema = EMAModel(accelerator.unwrap_model(model).parameters(), decay=args.ema_decay, foreach=True)
        accelerator.register_for_checkpointing(ema)

    def describe() -> dict[str, Any]:
        plain_model, plain_objective = accelerator.unwrap_model(model), accelerator.unwrap_model(objective)
        description = recipe.describe(plain_model)
        if validation is not None:
            description["validation_loss"] = validation_loss(
                accelerator,
                plain_model,
                plain_objective,
                scheduler,
                validation,
                args,
                vae,
                recipe.timestep_range(args),
            )
        return description

    # 3. Where to begin
    before = describe()
    set_seed(args.seed, device_specific=True)  # of the model's own noise
    first_step = resume(accelerator, args)
    if ema is not None:
        ema.to(accelerator.device)
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        resolved = yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)
        Path(args.output_dir, "training_arguments.yaml").write_text(resolved)
    if args.report_to != "none":
        accelerator.init_trackers(Path(args.output_dir).name, config=trackable(args))

    # 4. Train
    steps = training_steps(
        accelerator,
        model,
        objective,
        scheduler,
        optimizer,
        lr_scheduler,
        make_batches(accelerator, args, dataset, first_step),
        first_step=first_step,
        last_step=args.max_train_steps,
        batch_size=args.batch_size,
        seed=args.seed,
        random_flip=args.random_flip,
        max_grad_norm=args.max_grad_norm,
        recipe=recipe,
        vae=vae,
    )
    log = LossLog(accelerator, args, first_step)

    def finished_pipeline() -> ClassConditionalPipeline:
        id2label = label_names and dict(enumerate(label_names))
        pipeline_scheduler = DDPMScheduler.from_config(scheduler.config)  # sampling sets its timesteps
        components = recipe.components(accelerator.unwrap_model(model))
        return ClassConditionalPipeline(scheduler=pipeline_scheduler, vae=vae, id2label=id2label, **components)

    started = time.perf_counter()
    for done in steps:
        if ema is not None:
            ema.step(accelerator.unwrap_model(model).parameters())
        if expert_counts is not None:
            expert_counts.add(done.experts, args.batch_size)
        log(done, lr_scheduler.get_last_lr()[0])
        with log.paused():
            # before the checkpoint, so that who resumes from that has it
            if args.pipeline_steps and done.step % args.pipeline_steps == 0 and accelerator.is_main_process:
                with averaged_weights(accelerator.unwrap_model(model), ema):
                    save_whole(finished_pipeline(), Path(args.output_dir, f"pipeline-{done.step}"))
            if done.step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, args, done.step)
            if args.sample_steps and done.step % args.sample_steps == 0 and accelerator.is_main_process:
                with averaged_weights(accelerator.unwrap_model(model), ema):
                    draw_samples(accelerator, finished_pipeline(), args, done.step)
    log.close()
    train_seconds = time.perf_counter() - started

    # 5. Save
    accelerator.wait_for_everyone()
    with averaged_weights(accelerator.unwrap_model(model), ema):
        if accelerator.is_main_process and recipe.save is not None:
            recipe.save(accelerator.unwrap_model(model))
        elif accelerator.is_main_process:
            finished_pipeline().save_pretrained(os.path.join(args.output_dir, "pipeline"))
        after = describe()
    if accelerator.is_main_process:
        summary = {"steps": args.max_train_steps - first_step, "train_seconds": round(train_seconds, 1)}
        if expert_counts is not None:
            summary["samples_per_expert"] = expert_counts.samples
        if after:
            summary |= {"before": before, "after": after}
        Path(args.output_dir, "training_summary.json").write_text(json.dumps(summary) + "\n")
    # Besides the files: with gloo, a process that ends right upon a collective can wait for ever for a thread that still has
    # its tensors to free, and that in turn waits for the interpreter's lock.
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()


def check_batch_size(accelerator: Accelerator, args: TrainingArguments, objective: DiffusionObjective) -> None:
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    num_clusters = objective.train_intervals.num_experts
    if args.batch_size % (num_slices * num_clusters):
        raise ValueError(
            f"Expected `batch_size` to be divisible by {num_slices} (processes times accumulation steps) times "
            f"{num_clusters} (timestep clusters), but got {args.batch_size}."
        )


def make_optimizer(
    args: TrainingArguments, model: nn.Module, objective: DiffusionObjective, learning_rates: dict[str, float]
) -> torch.optim.Optimizer:
    """AdamW, with groups of their own for the parameters named in `learning_rates` and for what the objective learns."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_groups = [{"params": [parameters.pop(name)], "lr": lr} for name, lr in learning_rates.items()]
    parameter_groups = [{"params": list(parameters.values())}, *own_groups]
    if objective.uncertainty is not None:
        parameter_groups.append(
            {"params": list(objective.parameters()), "lr": args.uncertainty_learning_rate, "weight_decay": 0.0}
        )
    return torch.optim.AdamW(
        parameter_groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )


def make_batches(
    accelerator: Accelerator, args: TrainingArguments, dataset: datasets.Dataset, first_step: int
) -> Iterator[dict]:
    """This process's micro-batches, from `first_step` on."""
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    first_slice = accelerator.process_index * args.gradient_accumulation_steps
    own_slices = range(first_slice, first_slice + args.gradient_accumulation_steps)
    sampler = GlobalBatchSampler(len(dataset), args.batch_size, args.seed, num_slices, own_slices, first_step)
    items = training_items(dataset, args)
    pin_memory = accelerator.device.type == "cuda"
    return endless_batches(items, sampler, args.dataloader_num_workers, pin_memory)


def make_scheduler(args: TrainingArguments, in_latents: bool) -> DDPMScheduler:
    """The diffusion process, sampled ancestrally at evenly respaced timesteps, as published."""
    beta_schedule, beta_end = args.beta_schedule, args.beta_end
    if re.fullmatch(r"linear[\d.]+", beta_schedule):  # as Patch Diffusion calls them
        beta_schedule, beta_end = "linear", float(beta_schedule.removeprefix("linear"))
    return DDPMScheduler(
        num_train_timesteps=args.num_train_timesteps,
        beta_schedule=beta_schedule,
        beta_start=args.beta_start,
        beta_end=beta_end,
        prediction_type=args.prediction_type,
        variance_type="learned_range" if args.learn_sigma else "fixed_small",
        clip_sample=not in_latents,  # pixels end at ±1, latents nowhere
        timestep_spacing="linspace",
    )


def save_whole(pipeline: ClassConditionalPipeline, path: Path) -> None:
    """A pipeline gets its name when it is complete, in the place of what an earlier run left there."""
    with written_whole(path) as unfinished:
        pipeline.save_pretrained(unfinished)


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | None):
    """The model in eval mode with its averaged weights, and afterwards as it was."""
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        model.train()
        if ema is not None:
            ema.restore(model.parameters())


def draw_samples(
    accelerator: Accelerator, pipeline: ClassConditionalPipeline, args: TrainingArguments, step: int
) -> None:
    """Write `samples/step-<step>.png`, up to ten classes in columns (ten without classes), four rows; also to the tracker."""
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = 4, min(pipeline.num_classes or 10, 10)
    labels = {"batch_size": rows * columns}
    if pipeline.num_classes is not None:
        labels = {"class_labels": list(range(columns)) * rows}
    generator = torch.Generator(accelerator.device).manual_seed(args.seed)
    images = pipeline(**labels, num_inference_steps=args.sample_inference_steps, generator=generator).images
    path = Path(args.output_dir, "samples", f"step-{step}.png")
    path.parent.mkdir(exist_ok=True)
    grid = make_image_grid(images, rows, columns)
    grid.save(path)
    pixels = np.asarray(grid.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": pixels}, step=step, **layout)
