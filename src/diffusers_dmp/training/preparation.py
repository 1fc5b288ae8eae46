"""Everything that a training needs, made and checked before its first step."""

from dataclasses import replace

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from .arguments import LoopArguments
from .compilation import check_compilation, compile_model
from .conditions import LabelConditions
from .data.loop_data import LoopData
from .denoiser import Denoiser
from .loop import TrainingParts
from .loss_log import ExpertCounts
from .objectives.objective import Objective
from .optimisation import ScheduleFreeAverage, learns, make_ema, make_lr_scheduler, make_optimizer
from .recipe import TrainingRecipe
from .resuming import run_record
from .run import TrainingRun
from .sharding import ShardedAverage, check_sharding, set_up_sharding, without_weights


def prepare_run(
    accelerator: Accelerator,
    args: LoopArguments,
    model: nn.Module,
    objective: Objective,
    data: LoopData,
    recipe: TrainingRecipe,
) -> TrainingRun:
    """Everything that a training needs, on its device and registered for checkpoints; see [`train`]."""
    record = run_record(args, model, data, uses_loss_scaling=accelerator.mixed_precision == "fp16")
    check_batch(accelerator, args, objective, recipe)
    check_sharding(accelerator, args, model, objective, recipe)
    data.num_samples(args)  # raises if the arguments do not fit the classes
    if args.compile:
        check_compilation(accelerator, model)
        compile_model(model)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if data.vae is not None:
        data.vae.to(accelerator.device)
    conditions = recipe.conditions or LabelConditions(model.config.class_dropout_prob)  # type: ignore[union-attr,arg-type]
    optimizer = make_optimizer(args, model, objective, recipe.learning_rates)
    lr_scheduler = make_lr_scheduler(args, optimizer)
    structure = None
    if accelerator.is_fsdp2:
        structure = without_weights(model)
        set_up_sharding(accelerator, model)
        recipe = replace(recipe, shares_expert=True)
    prepared_model, optimizer = accelerator.prepare(model, optimizer)
    prepared_objective = accelerator.prepare(objective) if learns(objective) else objective.to(accelerator.device)

    # in the order of their files in a checkpoint
    accelerator.register_for_checkpointing(lr_scheduler)
    expert_counts = None
    if recipe.expert_intervals is not None:
        expert_counts = ExpertCounts(recipe.expert_intervals)
        accelerator.register_for_checkpointing(expert_counts)
    ema: EMAModel | ScheduleFreeAverage | None
    if structure is not None and args.ema_decay:
        ema = ShardedAverage(accelerator, prepared_model, args.ema_decay)
    else:
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
        structure=structure,
    )
    return TrainingRun(parts=parts, args=args, data=data, ema=ema, expert_counts=expert_counts, record=record)


def check_batch(accelerator: Accelerator, args: LoopArguments, objective: Objective, recipe: TrainingRecipe) -> None:
    """
    Check that a batch can be cut into micro-batches, and that only one of weighting and experts chooses its timesteps.

    Raises:
        ValueError: if it cannot, if both do, or if an expert has no timesteps.
    """
    num_slices = accelerator.num_processes * args.gradient_accumulation_steps
    num_clusters = objective.train_intervals.num_experts
    if args.batch_size % (num_slices * num_clusters):
        raise ValueError(
            f"Expected `batch_size` to be divisible by {num_slices} (processes times accumulation steps) times "
            f"{num_clusters} (timestep clusters), but got {args.batch_size}."
        )
    if recipe.expert_intervals is not None:
        experts = range(recipe.expert_intervals.num_experts) if recipe.expert is None else [recipe.expert]
        by_density = recipe.expert is None and recipe.expert_batches == "density"
        objective.check_experts(recipe.expert_intervals, experts, by_density)
    if recipe.expert_intervals is not None and num_clusters > 1:
        weighting = getattr(args, "weighting", None)
        raise ValueError(
            f"Expected `weighting` to leave the choice of timesteps to the experts, but got {weighting!r}."
        )
