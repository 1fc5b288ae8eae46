"""A whole training, from its processes to its summary."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, LoggerType, ProjectConfiguration, set_seed
from torch import nn

from ..saving.whole import remove_leftovers, written_whole
from .arguments import LoopArguments
from .checkpoints import PREFIX, checkpoint_step, checkpoint_to_resume
from .data.loop_data import LoopData
from .determinism import deterministic_algorithms, prepare_determinism
from .loss_log import trackable
from .objectives.objective import Objective
from .optimisation import averaged_weights
from .overview import describe_result, describe_run
from .pipeline_output import save_configurations, trained_pipeline
from .precision import check_precision
from .preparation import prepare_run
from .recipe import TrainingRecipe
from .resources import check_output_dir, explained_memory_errors
from .resuming import ARGUMENTS_NAME, OF_ONE_COMMAND, arguments_of_training, expect_same_run, recorded_arguments
from .run import Publisher, TrainingRun
from .sharding import expect_same_sharding
from .summary import SUMMARY_NAME, TrainingSummary

logger = logging.getLogger(__name__)


def make_accelerator(args: LoopArguments, find_unused_parameters: bool = False) -> Accelerator:
    """
    The processes, devices and trackers of a training. It has to be made before CUDA is used.

    Args:
        args ([`LoopArguments`]): For accumulation, precision, trackers, output folder and determinism.
        find_unused_parameters (`bool`): Whether the model may have parameters that its output does not depend on.

    Raises:
        ValueError: if the tracker that `report_to` names is not installed, or the device has not the precision.
    """
    if args.deterministic:
        prepare_determinism()
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
            # buffers are the same tables in every process
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=find_unused_parameters)
        ],
    )
    check_precision(accelerator.mixed_precision, accelerator.device)
    if accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "The launcher prepared for several processes, but started one: on CPUs, `accelerate launch` wants "
            "`--multi_gpu` beside `--num_processes`."
        )
    wants_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_shards and accelerator.distributed_type is not DistributedType.FSDP and accelerator.is_main_process:
        logger.warning("The weights are not sharded: Accelerate does that on accelerators alone, and here is none.")
    return accelerator


def train(
    accelerator: Accelerator,
    args: LoopArguments,
    model: nn.Module,
    objective: Objective,
    data: LoopData,
    recipe: TrainingRecipe | None = None,
    publisher: Publisher | None = None,
) -> None:
    """
    Train a model, and save it as a pipeline in `args.output_dir/pipeline`, or as the recipe says.

    Another training may follow; after the last one, the caller ends the processes with `accelerator.end_training()`.

    Args:
        accelerator (`Accelerator`): As [`make_accelerator`] returns it.
        args ([`LoopArguments`]): Everything that can be set.
        model (`nn.Module`): The model, on the CPU; or a module that stands for one, if `recipe` says how it is saved.
        objective ([`Objective`]): The noise process and the loss.
        data ([`LoopData`]): What it is trained on.
        recipe ([`TrainingRecipe`], *optional*): What the system trains differently from a plain DiT.
        publisher ([`Publisher`], *optional*): Publishes what there is before the end, for `args.push_to_hub`; see
            `hub/pushing.py`.

    Raises:
        ValueError: if the batch does not divide among processes, accumulation steps and timestep clusters, if an argument is
            unknown, if the checkpoint to resume from is broken or another run's, if `output_dir` cannot be written, if a
            loss or weight is not finite, or if the memory does not suffice.
        OSError: if the disk is full.
        SystemExit: after SIGTERM or Ctrl-C, when a checkpoint is written.
    """
    if args.push_to_hub and publisher is None:
        raise ValueError("Expected a `publisher` for `push_to_hub`, as `hub.pushing.with_hub` makes it, but got none.")
    with deterministic_algorithms(args.deterministic), explained_memory_errors(accelerator, args):
        checkpoint = checkpoint_to_resume(args, accelerator.is_main_process)
        run = prepare_run(accelerator, args, model, objective, data, recipe or TrainingRecipe())
        run.publisher = publisher
        if checkpoint is not None:
            expect_same_sharding(accelerator, checkpoint)
            expect_same_run(checkpoint, run.record, args)
            if checkpoint_step(checkpoint) == args.max_train_steps and is_complete(run):
                if accelerator.is_main_process:
                    logger.warning(
                        "%s is at `max_train_steps` already, and what it made is in %s: there is nothing to do.",
                        checkpoint,
                        args.output_dir,
                    )
                return
        check_output_dir(args.output_dir, run.needed_bytes())
        before = run.describe()
        set_seed(args.seed, device_specific=True)  # for the model's own noise
        first_step = run.resume(checkpoint)
        if run.ema is not None:
            run.ema.to(accelerator.device)
        if accelerator.is_main_process:
            prepare_output_dir(run, checkpoint, first_step)
        if args.report_to != "none":
            accelerator.init_trackers(Path(args.output_dir).name, config=trackable(args))
        if accelerator.is_main_process and run.parts.recipe.save is None and run.parts.recipe.save_to is None:
            save_configurations(trained_pipeline(run.parts, data, run.parts.described_model), args.output_dir)

        if accelerator.is_main_process:
            print(describe_run(run, first_step), flush=True)
        train_seconds = run.train_from(first_step)

        accelerator.wait_for_everyone()
        with averaged_weights(run.parts.plain_model, run.ema):
            run.save()
            after = run.describe()
        if accelerator.is_main_process and not Path(args.output_dir, SUMMARY_NAME).is_file():
            write_summary(run, args.max_train_steps - first_step, train_seconds, before, after)
        if accelerator.is_main_process:
            print(describe_result(run, before, after), flush=True)
        # This protects the files, and avoids a deadlock of gloo: a process that ends right after a collective can wait
        # forever for a thread that frees the collective's tensors and itself waits for Python's lock.
        accelerator.wait_for_everyone()
        for tracker in accelerator.trackers:
            tracker.finish()


def is_complete(run: TrainingRun) -> bool:
    """Whether a run of as many steps has ended in `output_dir`, and what it made is there."""
    folder = Path(run.args.output_dir)
    recorded = recorded_arguments(folder) or {}
    return (
        recorded.get("max_train_steps") == run.args.max_train_steps
        and (folder / SUMMARY_NAME).is_file()  # written last
        and (run.parts.recipe.save is not None or (folder / run.parts.recipe.saved_name).is_dir())
    )


def prepare_output_dir(run: TrainingRun, checkpoint: Path | None, first_step: int) -> None:
    """Write the arguments into `output_dir`, and remove what an earlier run left that does not hold for this one."""
    args = run.args
    values = {name: value for name, value in dataclasses.asdict(args).items() if name not in OF_ONE_COMMAND}
    has_summary = False
    if checkpoint is not None and first_step == args.max_train_steps:  # nothing is trained with the new ones
        values |= arguments_of_training(checkpoint, values)
        has_summary = (recorded_arguments(Path(args.output_dir)) or {}).get("max_train_steps") == first_step
    for prefix in (PREFIX, run.parts.recipe.saved_name):
        remove_leftovers(Path(args.output_dir), prefix)
    if not has_summary:
        Path(args.output_dir, SUMMARY_NAME).unlink(missing_ok=True)  # this run is not finished
    with written_whole(Path(args.output_dir, ARGUMENTS_NAME)) as unfinished:
        unfinished.write_text(yaml.safe_dump(values, sort_keys=False))


def write_summary(
    run: TrainingRun, steps: int, train_seconds: float, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Write what a finished training reports; see [`TrainingSummary`]."""
    summary = TrainingSummary(steps=steps, train_seconds=round(train_seconds, 1))
    if run.expert_counts is not None and any(run.expert_counts.samples):  # none are counted where timesteps decide
        summary.samples_per_expert = run.expert_counts.samples
    if after:
        summary.before, summary.after = before, after
    summary.save(run.args.output_dir)
