"""One training run: everything that it needs, and what it writes while it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from .arguments import SharedTrainingArguments
from .best_checkpoint import BestCheckpoint
from .checkpoints import save_checkpoint
from .conditions import LabelConditions
from .data.batches import training_batches, with_repeats
from .data.training_data import TrainingData
from .denoiser import Denoiser
from .loop import TrainingParts, TrainingStep, training_steps
from .loss_log import ExpertCounts, LossLog
from .objectives.objective import Objective
from .optimisation import (
    ScheduleFreeAverage,
    averaged_weights,
    current_learning_rate,
    learns,
    make_ema,
    make_lr_scheduler,
    make_optimizer,
)
from .pipeline_output import save_samples, save_whole, trained_pipeline
from .recipe import TrainingRecipe
from .validation import validation_loss


class Publisher(Protocol):
    """Publishes pipelines of a training that goes on."""

    def __call__(self, save: Callable[[Path], object], step: int) -> None:
        """
        Publish the pipeline after a step, in the main process.

        Args:
            save (`Callable[[Path], object]`): Saves it in a folder, if it is called before this returns.
            step (`int`): The number of steps done.
        """


@dataclass(kw_only=True)
class TrainingRun:
    """
    One training run: everything that it needs, and what it writes while it runs.

    Args:
        parts ([`TrainingParts`]): What is trained, and by what.
        args ([`SharedTrainingArguments`]): Everything that can be set.
        data ([`TrainingData`]): What it is trained on.
        ema ([`EMAModel`] or [`ScheduleFreeAverage`], *optional*): The averaged weights.
        expert_counts ([`ExpertCounts`], *optional*): The number of samples that each expert was trained on.
        publisher ([`Publisher`], *optional*): Is given the pipeline whenever it or a checkpoint is saved before the end.
    """

    parts: TrainingParts
    args: SharedTrainingArguments
    data: TrainingData
    ema: EMAModel | ScheduleFreeAverage | None
    expert_counts: ExpertCounts | None
    publisher: Publisher | None = None

    def describe(self) -> dict[str, Any]:
        """What the summary says of the model with its present weights; every process has to call."""
        description = self.parts.recipe.describe(self.parts.plain_model)
        if self.data.validation is not None:
            description["validation_loss"] = validation_loss(self.parts, self.args, self.data.validation)
        return description

    def train_from(self, first_step: int) -> float:
        """Do all steps from `first_step` on, with all that is written along the way. Returns the duration in seconds."""
        batches = training_batches(self.parts.accelerator, self.args, self.data.dataset, first_step)
        steps = training_steps(self.parts, self.args, batches, first_step)
        log = LossLog(self.parts.accelerator, self.args, first_step)
        best = BestCheckpoint(self.args.output_dir, first_step, self.parts.accelerator.is_main_process)
        started = time.perf_counter()
        for done in steps:
            if self.ema is not None:
                self.ema.step(self.parts.plain_model.parameters())
            if self.expert_counts is not None and done.experts is not None:
                self.expert_counts.add(done.experts.owners, self.args.batch_size)
            with log.paused():
                measured = self._validate_along_the_way(done, best)
            log(done, current_learning_rate(self.parts.optimizer), measured)
            with log.paused():
                self._write_along_the_way(done, best)
        log.close()
        return time.perf_counter() - started

    def _validate_along_the_way(self, done: TrainingStep, best: BestCheckpoint) -> dict[str, float]:
        """The validation loss of the averaged weights, by its name, if it is due after a step."""
        if not self.args.validation_steps or done.step % self.args.validation_steps or self.data.validation is None:
            return {}
        with averaged_weights(self.parts.plain_model, self.ema):
            loss = validation_loss(self.parts, self.args, self.data.validation)
        best.add(done.step, loss)
        return {"validation_loss": loss}

    def _write_along_the_way(self, done: TrainingStep, best: BestCheckpoint) -> None:
        """The pipeline, checkpoint and samples that are due after a step."""
        accelerator, args = self.parts.accelerator, self.args
        pipeline_is_due = args.pipeline_steps > 0 and done.step % args.pipeline_steps == 0
        # before the checkpoint, so that a run that is resumed from it has the pipeline too
        if pipeline_is_due and accelerator.is_main_process:
            with averaged_weights(self.parts.plain_model, self.ema):
                save_whole(trained_pipeline(self.parts, self.data), Path(args.output_dir, f"pipeline-{done.step}"))
        is_best = best.step == done.step
        if is_best and accelerator.is_main_process:
            best.save()
        checkpoint_is_due = done.step % args.checkpointing_steps == 0 or is_best
        if checkpoint_is_due:
            save_checkpoint(accelerator, args, done.step)
        if pipeline_is_due or checkpoint_is_due:
            self._publish(done)
        if args.sample_steps and done.step % args.sample_steps == 0 and accelerator.is_main_process:
            with averaged_weights(self.parts.plain_model, self.ema):
                save_samples(accelerator, trained_pipeline(self.parts, self.data), args, done.step)

    def _publish(self, done: TrainingStep) -> None:
        """Give the present pipeline to the publisher; the one after the last step is the training's, and published later."""
        is_main_process = self.parts.accelerator.is_main_process
        if self.publisher is not None and is_main_process and done.step < self.args.max_train_steps:
            with averaged_weights(self.parts.plain_model, self.ema):
                self.publisher(trained_pipeline(self.parts, self.data).save_pretrained, done.step)

    def save(self) -> None:
        """Save the trained model as the recipe says, or as a pipeline."""
        if self.parts.recipe.save is not None:
            self.parts.recipe.save(self.parts.plain_model)
        else:
            trained_pipeline(self.parts, self.data).save_pretrained(Path(self.args.output_dir, "pipeline"))


def prepare_run(
    accelerator: Accelerator,
    args: SharedTrainingArguments,
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    recipe: TrainingRecipe,
) -> TrainingRun:
    """Everything that a training needs, on its device and registered for checkpoints; see [`train`]."""
    check_batch(accelerator, args, objective, recipe)
    with_repeats(data.dataset, args)  # raises if the arguments do not fit the classes
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if data.vae is not None:
        data.vae.to(accelerator.device)
    conditions = recipe.conditions or LabelConditions(model.config.class_dropout_prob)  # type: ignore[union-attr,arg-type]
    optimizer = make_optimizer(args, model, objective, recipe.learning_rates)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    prepared_model, optimizer = accelerator.prepare(model, optimizer)
    prepared_objective = accelerator.prepare(objective) if learns(objective) else objective.to(accelerator.device)

    # in the order of their files in a checkpoint
    accelerator.register_for_checkpointing(lr_scheduler)
    expert_counts = None
    if recipe.expert_intervals is not None:
        expert_counts = ExpertCounts(recipe.expert_intervals)
        accelerator.register_for_checkpointing(expert_counts)
    ema = make_ema(args, accelerator.unwrap_model(prepared_model), optimizer)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    parts = TrainingParts(
        accelerator=accelerator,
        model=prepared_model,
        objective=prepared_objective,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        recipe=recipe,
        denoiser=recipe.denoiser or Denoiser(data.sample_shape),
        conditions=conditions,
        vae=data.vae,
    )
    return TrainingRun(parts=parts, args=args, data=data, ema=ema, expert_counts=expert_counts)


def check_batch(
    accelerator: Accelerator, args: SharedTrainingArguments, objective: Objective, recipe: TrainingRecipe
) -> None:
    """
    Check that a batch can be cut into micro-batches, and that only one of weighting and experts chooses its timesteps.

    Raises:
        ValueError: if it cannot, or if both do.
    """
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    num_clusters = objective.train_intervals.num_experts
    if args.batch_size % (num_slices * num_clusters):
        raise ValueError(
            f"Expected `batch_size` to be divisible by {num_slices} (processes times accumulation steps) times "
            f"{num_clusters} (timestep clusters), but got {args.batch_size}."
        )
    if recipe.expert_intervals is not None and num_clusters > 1:
        weighting = getattr(args, "weighting", None)
        raise ValueError(
            f"Expected `weighting` to leave the choice of timesteps to the experts, but got {weighting!r}."
        )
