"""What a training is about to do, and what it has done, in a few lines that are printed before its first step and at the end."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .adapted import AdaptedDenoiser
from .arguments import LoopArguments
from .data.listing import shorten
from .metrics_file import METRICS_NAME
from .recipe import TrainingRecipe
from .run import TrainingRun
from .validation import VALIDATION_LOSS


def describe_run(run: TrainingRun, first_step: int) -> str:
    """
    Describe a training in words.

    Args:
        run ([`TrainingRun`]): With everything that the training needs.
        first_step (`int`): The number of steps that are done.
    """
    args, data, accelerator = run.args, run.data, run.parts.accelerator
    recipe = run.parts.recipe
    rows = {
        "data": f"{args.dataset}: {data.describe()}",
        "validation": "none",
        "model": _describe_model(run.parts.described_model),
        **({} if recipe.expert_intervals is None else {"experts": _describe_experts(recipe)}),
        "steps": _describe_steps(args, accelerator, data.num_samples(args), first_step),
        "device": _describe_device(accelerator) + (", compiled" if args.compile else ""),
        "output": _describe_output(run),
    }
    if data.num_validation_samples(args):
        when = (
            f"before, every {args.validation_steps} steps and after" if args.validation_steps else "before and after"
        )
        rows["validation"] = f"{args.validation_dataset}: {data.describe_validation()}; {when}"
    return _table(rows)


def describe_result(run: TrainingRun, before: dict[str, Any], after: dict[str, Any]) -> str:
    """
    Say where what was trained lies, and what it has gained on held-out samples.

    Args:
        run ([`TrainingRun`]): Finished.
        before, after (`dict[str, Any]`): As [`TrainingRun.describe`] returned them.
    """
    recipe = run.parts.recipe
    folder = Path(run.args.output_dir, "" if recipe.save is not None else recipe.saved_name)
    rows = {"result": os.path.normpath(folder)}
    losses = {
        name: f"{before[name]:.4f} → {loss:.4f}" for name, loss in after.items() if name.startswith(VALIDATION_LOSS)
    }
    if losses:
        total = losses.pop(VALIDATION_LOSS)
        by_interval = [f"{name.partition('/')[2]}: {change}" for name, change in losses.items()]
        rows["validation"] = "; ".join([f"loss {total}", *by_interval])
    return _table(rows)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"{name + ':':<12}{text}" for name, text in rows.items())


def _describe_model(model: nn.Module) -> str:
    parameters = list(model.parameters())
    if isinstance(model, AdaptedDenoiser):
        trained = sum(parameter.numel() for parameter in parameters)
        return f"{type(model.denoiser).__name__}, frozen; {trained:,} parameters beside it are trained"
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"{type(model).__name__}, {total:,} parameters, {'all' if trained == total else f'{trained:,}'} of them trained"


def _describe_experts(recipe: TrainingRecipe) -> str:
    assert recipe.expert_intervals is not None  # of the caller's recipe
    edges = [f"{edge:g}" for edge in recipe.expert_intervals.edges]
    intervals = [f"{low} to {high}" for low, high in zip(edges, edges[1:])]
    trained = "" if recipe.expert is None else f"; number {recipe.expert} is trained"
    return f"{len(intervals)}, for the timesteps {shorten(intervals)}{trained}"


def _describe_steps(args: LoopArguments, accelerator: Accelerator, num_images: int, first_step: int) -> str:
    epochs = args.max_train_steps * args.batch_size / num_images
    parts = [f"{accelerator.num_processes} processes"] if accelerator.num_processes > 1 else []
    if args.gradient_accumulation_steps > 1:
        parts.append(f"{args.gradient_accumulation_steps} accumulation steps")
    micro_batch = args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)
    batch = f"{args.batch_size} images" + (f" ({' x '.join([*parts, str(micro_batch)])})" if parts else "")
    texts = [
        f"{args.max_train_steps} of {batch}",
        f"{epochs:,.{0 if epochs >= 100 else 2}f} epochs of {num_images} images",
        "classes balanced" if getattr(args, "balance_classes", False) else "",
        f"from step {first_step} on" if first_step else "",
        f"{args.optimizer}, {args.lr_scheduler} learning rate {args.learning_rate:g}",
    ]
    return "; ".join(text for text in texts if text)


def _describe_device(accelerator: Accelerator) -> str:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    precision = {"no": "32 bits"}.get(accelerator.mixed_precision, f"mixed precision {accelerator.mixed_precision}")
    return f"{device} ({name}), {precision}"


def _describe_output(run: TrainingRun) -> str:
    args = run.args
    kept = "all" if args.checkpoints_total_limit is None else f"the last {args.checkpoints_total_limit}"
    best = " and the best" if args.validation_steps else ""
    parts = [f"checkpoints every {args.checkpointing_steps} steps and at the end ({kept}{best} kept)"]
    if args.pipeline_steps:
        parts.append(f"pipelines every {args.pipeline_steps} steps")
    if args.sample_steps:
        parts.append(f"samples every {args.sample_steps} steps")
    parts.append(METRICS_NAME if args.report_to == "none" else f"{METRICS_NAME}, logs for {args.report_to}")
    is_pipeline = run.parts.recipe.save is None and run.parts.recipe.saved_name == "pipeline"
    parts.append("the finished pipeline" if is_pipeline else "the finished weights")
    return f"{args.output_dir}: {', '.join(parts)}"
