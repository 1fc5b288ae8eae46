"""The noise schedule and the objective that the arguments of a training ask for."""

import re
from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..arguments import NoiseArguments, ObjectiveArguments, ProcessArguments, TrainingArguments
from .ddpm import DiffusionObjective
from .flow import FlowObjective
from .noising import FlowNoising, Noising
from .objective import Objective
from .shifts import ResolutionShift, parsed_shift, shift_of


def noise_schedule(args: NoiseArguments) -> dict[str, Any]:
    """The arguments of a Diffusers scheduler that define its noise levels."""
    beta_schedule, beta_end = args.beta_schedule, args.beta_end
    if re.fullmatch(r"linear[\d.]+", beta_schedule):  # Patch Diffusion's name for a linear schedule up to that beta
        beta_schedule, beta_end = "linear", float(beta_schedule.removeprefix("linear"))
    return {
        "num_train_timesteps": args.num_train_timesteps,
        "beta_schedule": beta_schedule,
        "beta_start": args.beta_start,
        "beta_end": beta_end,
    }


def noise_record(args: Any) -> dict[str, Any]:
    """
    What a saved model says of the noise it was trained on; [`NoiseProcess.from_record`] reads it.

    Args:
        args: The arguments of a training, of this version or an older one; those of [`NoiseArguments`], and the `objective`.
    """
    if getattr(args, "objective", "ddpm") == "flow":  # up to 0.3, PPAP had none
        return {"process": "flow_matching", "num_train_timesteps": args.num_train_timesteps}
    return {"process": "diffusion", **noise_schedule(args)}


def make_noising(args: ProcessArguments, scheduler: SchedulerMixin) -> Noising:
    """
    How samples without tokens are noised, such as the images of an expert that guides.

    Args:
        args ([`ProcessArguments`]): For the process and, for flow matching, the density and its shift, a number.
        scheduler ([`SchedulerMixin`]): A scheduler of that process.
    """
    if args.objective != "flow":
        return Noising(scheduler)
    return FlowNoising(scheduler, args.noise_density(1.0 if args.shift is None else float(args.shift)))


def make_scheduler(args: TrainingArguments, in_latents: bool) -> DDPMScheduler:
    """
    The diffusion process of a training; it samples ancestrally at evenly spaced timesteps, as published.

    Args:
        args ([`TrainingArguments`]): For the noise schedule and what the model predicts.
        in_latents (`bool`): Whether the samples are latents, which are not clipped to ±1 as pixels are.
    """
    return DDPMScheduler(
        **noise_schedule(args),
        prediction_type=args.prediction_type,
        variance_type="learned_range" if args.learn_sigma else "fixed_small",
        clip_sample=not in_latents,
        timestep_spacing="linspace",
    )


def make_objective(args: TrainingArguments, model: nn.Module, in_latents: bool) -> Objective:
    """
    The objective of a denoiser.

    Args:
        args ([`TrainingArguments`]): For the noise process, what the model predicts, the variance, the weighting and, for flow
            matching, the density.
        model (`nn.Module`): The denoiser; its `variance_type`, if it has one, says what its variance channels mean.
        in_latents (`bool`): Whether it is trained on latents.

    Raises:
        ValueError: if the prediction type or the weighting is unknown.
    """
    if args.objective == "flow":
        config: Any = model.config
        return make_flow_objective(args, make_flow_scheduler(args, model), config.patch_size)
    variance_type = getattr(model, "variance_type", "learned_range") if args.learn_sigma else None
    scheduler = make_scheduler(args, in_latents)
    return DiffusionObjective(scheduler, args.weighting, variance_type, args.uncertainty_learning_rate)


def make_flow_scheduler(args: TrainingArguments, model: nn.Module) -> FlowMatchEulerDiscreteScheduler:
    """
    The flow-matching process of a new model, which is sampled with the shift that it is trained with.

    Args:
        args ([`TrainingArguments`]): For T and the shift.
        model (`nn.Module`): The denoiser, whose configuration has `in_channels`, `sample_size` and `patch_size`.
    """
    shift = 1.0 if args.shift is None else parsed_shift(args.shift)
    if isinstance(shift, str):  # by resolution, of which the model has one
        config: Any = model.config
        size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        shift = ResolutionShift(patch_size=config.patch_size)((config.in_channels, size, size))
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=args.num_train_timesteps, shift=shift)


def make_flow_objective(args: ObjectiveArguments, scheduler: SchedulerMixin, patch_size: int) -> FlowObjective:
    """
    Flow matching with a scheduler, such as that of a pretrained pipeline.

    Args:
        args ([`ObjectiveArguments`]): For the density, its shift, which is by default the scheduler's, and the weighting.
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler.
        patch_size (`int`): Side of the squares of (latent) pixels that become tokens, for a shift by resolution.

    Raises:
        ValueError: if the weighting is unknown, or the scheduler is of another process.
    """
    shift = shift_of(scheduler) if args.shift is None else parsed_shift(args.shift)
    by_resolution = ResolutionShift.of_scheduler(scheduler, patch_size) if isinstance(shift, str) else None
    density = args.noise_density() if isinstance(shift, str) else args.noise_density(shift)
    return FlowObjective(scheduler, density, by_resolution, args.weighting, args.uncertainty_learning_rate)
