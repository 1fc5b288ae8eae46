"""The noise schedule and the objective that the arguments of a training ask for."""

import re
from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from ..arguments import NoiseArguments, TrainingArguments
from .ddpm import DiffusionObjective
from .flow import FlowObjective
from .objective import Objective
from .shifts import BY_RESOLUTION, ResolutionShift, parsed_shift


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
        return make_flow_objective(args, model)
    variance_type = getattr(model, "variance_type", "learned_range") if args.learn_sigma else None
    scheduler = make_scheduler(args, in_latents)
    return DiffusionObjective(scheduler, args.weighting, variance_type, args.uncertainty_learning_rate)


def make_flow_objective(args: TrainingArguments, model: nn.Module) -> FlowObjective:
    """
    Flow matching for a denoiser of samples of one shape; it is sampled with the shift that it is trained with.

    Args:
        args ([`TrainingArguments`]): For the density and its shift, T and the weighting.
        model (`nn.Module`): The denoiser, whose configuration has `in_channels`, `sample_size` and `patch_size`.

    Raises:
        ValueError: if the weighting is unknown.
    """
    config: Any = model.config
    shift = 1.0 if args.shift is None else parsed_shift(args.shift)
    if shift == BY_RESOLUTION:
        size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        shift = ResolutionShift(patch_size=config.patch_size)((config.in_channels, size, size))
    shift = float(shift)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=args.num_train_timesteps, shift=shift)
    return FlowObjective(
        scheduler,
        args.noise_density(shift),
        weighting=args.weighting,
        uncertainty_learning_rate=args.uncertainty_learning_rate,
    )
