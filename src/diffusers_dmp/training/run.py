"""One training run: everything that it needs, and what it writes while it runs."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .arguments import LoopArguments
from .best_checkpoint import BestCheckpoint
from .checkpoints import PREFIX, checkpoint_step, remove_surplus_checkpoints, save_checkpoint
from .compilation import eagerly, graphs_for_experts
from .data.loop_data import LoopData
from .finite import FiniteCheck
from .interruption import Interruption
from .loop import TrainingParts, TrainingStep, training_steps
from .loss_log import ExpertCounts, LossLog
from .optimisation import (
    ScheduleFreeAverage,
    averaged_weights,
    current_learning_rate,
    hyperparameters,
    set_hyperparameters,
)
from .pipeline_output import save_samples, save_whole, trained_pipeline
from .resources import num_bytes
from .sharding import local_parameters
from .validation import VALIDATION_LOSS, validation_losses

logger = logging.getLogger(__name__)


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
        args ([`LoopArguments`]): Everything that can be set.
        data ([`LoopData`]): What it is trained on.
        ema ([`EMAModel`] or [`ScheduleFreeAverage`], *optional*): The averaged weights.
        expert_counts ([`ExpertCounts`], *optional*): The number of samples that each expert was trained on.
        record (`dict[str, Any]`): What its checkpoints say of it; see [`run_record`].
        publisher ([`Publisher`], *optional*): Is given the pipeline whenever it or a checkpoint is saved before the end.
    """

    parts: TrainingParts
    args: LoopArguments
    data: LoopData
    ema: EMAModel | ScheduleFreeAverage | None
    expert_counts: ExpertCounts | None
    record: dict[str, Any]
    publisher: Publisher | None = None

    def __post_init__(self):
        self.finite = FiniteCheck(self.parts.accelerator, self.args, self.num_train_timesteps)

    @property
    def num_train_timesteps(self) -> int:
        """T of the noise process."""
        return self.parts.plain_objective.train_intervals.num_train_timesteps

    @property
    def saves(self) -> bool:
        """Whether this process takes part in saving and sampling: the main process, or all of them if weights are sharded."""
        return self.parts.accelerator.is_main_process or self.parts.structure is not None

    def describe(self) -> dict[str, Any]:
        """What the summary says of the model with its present weights; every process has to call."""
        description = self.parts.recipe.describe(self.parts.plain_model)
        if self.data.num_validation_samples(self.args):
            with eagerly(self.args.compile):
                description |= validation_losses(self.parts, self.args, self.data)
        return description

    def needed_bytes(self) -> int:
        """The size of a checkpoint and of the pipeline, about."""
        model = self.parts.described_model
        learned = [parameter for group in self.parts.optimizer.param_groups for parameter in group["params"]]
        averaged = [] if self.ema is None else model.parameters()
        recipe = self.parts.recipe
        has_own_way = recipe.save is not None or recipe.save_to is not None
        saved = [model] if has_own_way else self._pipeline_components()
        # weights, AdamW's two moments, averaged weights
        checkpoint = num_bytes(model.state_dict().values()) + 2 * num_bytes(learned) + num_bytes(averaged)
        return checkpoint + sum(num_bytes(module.state_dict().values()) for module in saved)

    def _pipeline_components(self) -> list[nn.Module]:
        components = trained_pipeline(self.parts, self.data, self.parts.described_model).components.values()
        return [component for component in components if isinstance(component, nn.Module)]

    def resume(self, checkpoint: Path | None) -> int:
        """
        Load a checkpoint; the arguments' learning rates, weight decay, betas and EMA decay then take effect.

        Returns:
            `int`: The number of steps that are done; 0 without a checkpoint.
        """
        if checkpoint is None:
            return 0
        wanted = hyperparameters(self.parts.optimizer)
        self.parts.accelerator.load_state(str(checkpoint))
        set_hyperparameters(self.parts.optimizer, self.parts.lr_scheduler, wanted)
        if isinstance(self.ema, EMAModel):
            self.ema.decay = self.args.ema_decay
        step = checkpoint_step(checkpoint)
        if step == self.args.max_train_steps and self.parts.accelerator.is_main_process:
            logger.warning("%s is at `max_train_steps` already: there is nothing left to train.", checkpoint)
        return step

    def train_from(self, first_step: int) -> float:
        """
        Do all steps from `first_step` on, with all that is written along the way. Returns the duration in seconds.

        Raises:
            ValueError: if a loss or a weight is not finite.
            SystemExit: after SIGTERM or Ctrl-C, when a checkpoint is written.
        """
        started = time.perf_counter()
        for _ in self.steps_from(first_step):
            pass
        return time.perf_counter() - started

    def steps_from(self, first_step: int) -> Iterator[TrainingStep]:
        """The steps of [`train_from`], each when it is asked for."""
        batches = self.data.training_batches(self.parts.accelerator, self.args, first_step)
        steps = training_steps(self.parts, self.args, batches, first_step)
        intervals = self.parts.recipe.expert_intervals
        graphs = graphs_for_experts(self.args.compile, 1 if intervals is None else intervals.num_experts)
        log = LossLog(self.parts.accelerator, self.args, self.num_train_timesteps, first_step)
        validation = self.data.validation_identity(self.args)
        best = BestCheckpoint(self.args.output_dir, first_step, validation, self.parts.accelerator.is_main_process)
        with graphs, Interruption(self.parts.accelerator) as interruption, closing(log):
            for done in steps:
                if self.ema is not None:
                    self.ema.step(local_parameters(self.parts.plain_model))
                if self.expert_counts is not None and done.experts is not None:
                    self.expert_counts.add(done.experts.owners, self.args.batch_size)
                learning_rate = current_learning_rate(self.parts.optimizer)
                self.finite.add(done, learning_rate)
                if log.is_due(done.step):
                    self.finite.expect_finite_losses()
                with log.paused(), eagerly(self.args.compile):
                    measured = self._validate_along_the_way(done, best)
                log(done, learning_rate, measured)
                with log.paused(), eagerly(self.args.compile):
                    self._write_along_the_way(done, best)
                received = interruption.signal_received()
                if received is not None:
                    self._end_early(done, received)
                yield done

    def _validate_along_the_way(self, done: TrainingStep, best: BestCheckpoint) -> dict[str, float]:
        """The validation loss of the averaged weights, by its name, if it is due after a step."""
        is_due = self.args.validation_steps and done.step % self.args.validation_steps == 0
        if not is_due or not self.data.num_validation_samples(self.args):
            return {}
        self._expect_finite(done.step)
        with averaged_weights(self.parts.plain_model, self.ema):
            measured = validation_losses(self.parts, self.args, self.data)
        best.add(done.step, measured[VALIDATION_LOSS])
        return measured

    def _write_along_the_way(self, done: TrainingStep, best: BestCheckpoint) -> None:
        """The pipeline, checkpoint and samples that are due after a step."""
        accelerator, args = self.parts.accelerator, self.args
        pipeline_is_due, samples_are_due = (
            steps > 0 and done.step % steps == 0 for steps in (args.pipeline_steps, args.sample_steps)
        )
        is_best = best.step == done.step
        checkpoint_is_due = self._checkpoint_is_due(done.step) or is_best
        if pipeline_is_due or samples_are_due or checkpoint_is_due:
            self._expect_finite(done.step)
        # before the checkpoint, so that a run that is resumed from it has the pipeline too
        if pipeline_is_due and self.saves:
            with averaged_weights(self.parts.plain_model, self.ema):
                self._save_to(Path(args.output_dir, f"{self.parts.recipe.saved_name}-{done.step}"))
        if checkpoint_is_due:
            save_checkpoint(accelerator, args, done.step, self.record)
            # in this order, so that the best of a run that is killed in between is there
            if is_best and accelerator.is_main_process:
                best.save()
            if accelerator.is_main_process:
                remove_surplus_checkpoints(args, done.step)
        if pipeline_is_due or checkpoint_is_due:
            self._publish(done)
        if samples_are_due and self.saves:
            with averaged_weights(self.parts.plain_model, self.ema):
                pipeline = trained_pipeline(self.parts, self.data, self.parts.plain_model)
                save_samples(self.parts, pipeline, args, done.step)

    def _checkpoint_is_due(self, step: int) -> bool:
        """Whether a step ends with a checkpoint; the last one does, so that nothing is lost while the model is saved."""
        return step % self.args.checkpointing_steps == 0 or step == self.args.max_train_steps

    def _expect_finite(self, step: int) -> None:
        """Check all losses so far, the weights and their average; every process has to call, before they are used."""
        self.finite.expect_finite_losses()
        self.finite.expect_finite_weights(self._saved_weights(), step)

    def _saved_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.parts.plain_model.state_dict().items()
        yield from (
            (name, value) for name, value in self.parts.plain_objective.named_parameters() if value.requires_grad
        )
        if self.ema is not None:
            names = (name for name, _ in self.parts.plain_model.named_parameters())
            yield from ((f"the average of {name}", average) for name, average in zip(names, self.ema.shadow_params))

    def _end_early(self, done: TrainingStep, received: int) -> None:
        """Write a checkpoint, say how to go on, and end the process as shells expect it after a signal."""
        accelerator, args = self.parts.accelerator, self.args
        if not self._checkpoint_is_due(done.step):
            self._expect_finite(done.step)
            save_checkpoint(accelerator, args, done.step, self.record)
            if accelerator.is_main_process:
                remove_surplus_checkpoints(args, done.step)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            logger.warning(
                "Ended by %s after step %d, in %s. The same command with `--resume_from_checkpoint latest` goes on.",
                signal.Signals(received).name,
                done.step,
                Path(args.output_dir, f"{PREFIX}{done.step}"),
            )
        accelerator.end_training()
        raise SystemExit(128 + received)

    def _publish(self, done: TrainingStep) -> None:
        """Give the present pipeline to the publisher; the one after the last step is the training's, and published later."""
        if self.publisher is None or done.step == self.args.max_train_steps or not self.saves:
            return
        with averaged_weights(self.parts.plain_model, self.ema):
            model = self.parts.whole_model()
            if self.parts.accelerator.is_main_process:
                self.publisher(partial(self._write, model), done.step)

    def save(self) -> None:
        """
        Save the trained model as the recipe says, or as a pipeline; every process has to call.

        Raises:
            ValueError: if its weights are not finite.
        """
        self.finite.expect_finite_weights(self.parts.plain_model.state_dict().items(), self.args.max_train_steps)
        model = self.parts.whole_model()
        if not self.parts.accelerator.is_main_process:
            return
        if self.parts.recipe.save is not None:
            self.parts.recipe.save(model)
        else:
            self._write(model, Path(self.args.output_dir, self.parts.recipe.saved_name))

    def _save_to(self, folder: Path) -> None:
        """Save the model with its present weights in a folder; every process that `saves` has to call."""
        model = self.parts.whole_model()
        if self.parts.accelerator.is_main_process:
            self._write(model, folder)

    def _write(self, model: nn.Module, folder: Path) -> None:
        """Write a whole model into a folder as the recipe says, or as a pipeline."""
        recipe = self.parts.recipe
        if recipe.save_to is not None:
            recipe.save_to(model, folder)
        else:
            save_whole(trained_pipeline(self.parts, self.data, model), folder)
