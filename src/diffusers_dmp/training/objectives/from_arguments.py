"""The noise schedule and the objective that the arguments of a training ask for."""

import re
from typing import Any

from diffusers import DDPMScheduler
from torch import nn

from ..arguments import NoiseArguments, TrainingArguments
from .ddpm import DiffusionObjective
from .objective import Objective


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
        args ([`TrainingArguments`]): For the noise schedule, the prediction type, the variance and the weighting.
        model (`nn.Module`): The denoiser; its `variance_type`, if it has one, says what its variance channels mean.
        in_latents (`bool`): Whether it is trained on latents.

    Raises:
        ValueError: if the prediction type or the weighting is unknown.
    """
    variance_type = getattr(model, "variance_type", "learned_range") if args.learn_sigma else None
    scheduler = make_scheduler(args, in_latents)
    return DiffusionObjective(scheduler, args.weighting, variance_type, args.uncertainty_learning_rate)
