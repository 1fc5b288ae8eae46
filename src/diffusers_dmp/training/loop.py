"""The one training loop: a generator of optimiser steps that leaves logging, averaging and saving to its caller.

Every random number of a step (which images, flips, latents' noise, timesteps, noise, dropped labels) is drawn for the
whole batch from (seed, step) alone, and each process takes its slice. So a run can be cut anywhere and resumed, and any
number of processes and accumulation steps trains on the same batches (but for the timesteps of a recipe that gives each
process an expert).

Legend: B batch size of one optimiser step over all processes, b that of one micro-batch, C channels, S sample size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from ..diffusion.latents import scale_latents
from ..intervals import NoiseIntervals
from .data.latents import latent_distribution
from .objectives.ddpm import DiffusionObjective
from .objectives.timesteps import balanced_timesteps, expert_timesteps
from .recipe import TrainingRecipe


@dataclass
class TrainingStep:
    """
    What one optimiser step did.

    Args:
        step (`int`): How many steps are done.
        loss (`torch.Tensor` of shape ()): This process's part of the batch.
        sample_losses (`torch.Tensor`), timesteps (`torch.LongTensor`): Of shape (B / processes,): sample by sample.
        grad_norm (`torch.Tensor` of shape (), *optional*): Before clipping.
        auxiliary_losses (`dict[str, torch.Tensor]`): Unweighted, of this process's last micro-batch.
        experts (`list[int]`, *optional*): The expert of each process's part of the batch.
    """

    step: int
    loss: torch.Tensor
    sample_losses: torch.Tensor
    timesteps: torch.LongTensor
    grad_norm: torch.Tensor | None
    auxiliary_losses: dict[str, torch.Tensor]
    experts: list[int] | None


@dataclass
class StepRandomness:
    """The random numbers of one optimiser step, for all B samples; [`take`] cuts out a micro-batch's."""

    timesteps: torch.LongTensor  # (B,)
    noise: torch.Tensor  # (B, C, S, S)
    latent_noise: torch.Tensor | None  # (B, C, S, S), for the VAE's posterior
    drop_ids: torch.BoolTensor  # (B,)
    flips: torch.BoolTensor  # (B,)

    def take(self, index: int, count: int) -> "StepRandomness":
        """The `index`-th of `count` equal slices."""
        return StepRandomness(
            **{name: value if value is None else value.chunk(count)[index] for name, value in vars(self).items()}
        )


def draw_step(
    seed: int,
    step: int,
    batch_size: int,
    sample_shape: tuple[int, int, int],
    objective: DiffusionObjective,
    class_dropout_prob: float,
    flip_prob: float,
    with_latents: bool,
    device: torch.device,
    expert_intervals: NoiseIntervals | None = None,
    experts: list[int] | None = None,
) -> StepRandomness:
    """
    Args:
        seed (`int`), step (`int`): What alone decides the outcome (on one kind of device).
        batch_size (`int`): B.
        sample_shape (`tuple[int, int, int]`): (C, S, S).
        objective ([`DiffusionObjective`]): Whose `train_intervals` the timesteps are balanced over.
        class_dropout_prob (`float`), flip_prob (`float`): How often a label is dropped, an image mirrored.
        with_latents (`bool`): Whether a VAE's posterior is to be sampled.
        device (`torch.device`): Where to draw, and where the result lies.
        expert_intervals ([`NoiseIntervals`]), experts (`list[int]`, *optional*): See [`expert_timesteps`].
    """
    (state,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    generator = torch.Generator(device).manual_seed(int(state))
    shape = (batch_size, *sample_shape)
    if experts is None:
        timesteps = balanced_timesteps(objective.train_intervals, batch_size, generator)
    else:
        timesteps = expert_timesteps(expert_intervals, experts, batch_size, generator)
    return StepRandomness(
        timesteps=timesteps,
        noise=torch.randn(shape, generator=generator, device=device),
        latent_noise=torch.randn(shape, generator=generator, device=device) if with_latents else None,
        drop_ids=torch.rand(batch_size, generator=generator, device=device) < class_dropout_prob,
        flips=torch.rand(batch_size, generator=generator, device=device) < flip_prob,
    )


def draw_experts(seed: int, step: int, num_experts: int, num_processes: int) -> list[int]:
    """One expert for each process, on the host, where the model needs to know it."""
    return np.random.default_rng([seed, step]).integers(num_experts, size=num_processes).tolist()


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    objective: DiffusionObjective,
    scheduler,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterator[dict],
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    seed: int,
    random_flip: bool,
    max_grad_norm: float | None,
    recipe: TrainingRecipe,
    vae: AutoencoderKL | None = None,
) -> Iterator[TrainingStep]:
    """
    Train, one optimiser step for each item that is asked for.

    Args:
        accelerator, model, objective, optimizer: As `accelerator.prepare` returned them.
        scheduler: Adds the noise.
        batches (`Iterator[dict]`): This process's micro-batches: `images` (b, C, S, S), or `mean` and `std` of latents
            (b, 2, C, S, S), and, optionally, `class_labels` (b,).
        first_step (`int`), last_step (`int`): The steps to do, the last exclusive.
        batch_size (`int`): B.
        random_flip (`bool`): Mirror half of the images.
        max_grad_norm (`float`, *optional*): Clip the gradients' global norm to this.
        recipe ([`TrainingRecipe`]): What the system trains differently.
        vae ([`AutoencoderKL`], *optional*): Frozen, to train on its latents.
    """
    config = accelerator.unwrap_model(model).config
    plain_objective = accelerator.unwrap_model(objective)
    num_accumulated = accelerator.gradient_accumulation_steps
    num_slices = accelerator.num_processes * num_accumulated
    model.train()

    for step in range(first_step, last_step):
        experts, expert_kwargs = None, {}
        if recipe.expert is not None:
            experts = [recipe.expert] * accelerator.num_processes
        elif recipe.expert_intervals is not None:
            experts = draw_experts(seed, step, recipe.expert_intervals.num_experts, accelerator.num_processes)
            expert_kwargs = {"expert": experts[accelerator.process_index]}
        randomness = draw_step(
            seed,
            step,
            batch_size,
            (config.in_channels, config.sample_size, config.sample_size),
            plain_objective,
            config.class_dropout_prob,
            0.5 if random_flip else 0.0,
            vae is not None,
            accelerator.device,
            recipe.expert_intervals,
            experts,
        )
        auxiliary_weights = recipe.auxiliary_weights(step)
        losses, sample_losses, timesteps, grad_norm = [], [], [], None
        for micro_step in range(num_accumulated):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(batches).items()}
            own = randomness.take(accelerator.process_index * num_accumulated + micro_step, num_slices)

            with accelerator.accumulate(model, objective):
                x0 = clean_samples(batch, own, vae)
                x_t = scheduler.add_noise(x0, own.noise, own.timesteps)  # √ᾱ·x0 + √(1-ᾱ)·ε
                model_output = model(
                    x_t,
                    own.timesteps,
                    class_labels=batch.get("class_labels"),
                    force_drop_ids=own.drop_ids,
                    **expert_kwargs,
                )
                own_columns = {name: batch[name] for name in plain_objective.columns}
                objective_output = objective(model_output.sample, x0, own.noise, own.timesteps, **own_columns)
                auxiliary_losses = {name: model_output[name] for name in auxiliary_weights}
                auxiliary_loss = sum(auxiliary_weights[name] * value for name, value in auxiliary_losses.items())
                accelerator.backward(objective_output.loss + auxiliary_loss)
                if accelerator.sync_gradients and max_grad_norm is not None:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

            losses.append(objective_output.loss.detach())
            sample_losses.append(objective_output.sample_losses.detach())
            timesteps.append(own.timesteps)
        lr_scheduler.step()
        yield TrainingStep(
            step=step + 1,
            loss=torch.stack(losses).mean(),
            sample_losses=torch.cat(sample_losses),
            timesteps=torch.cat(timesteps),
            grad_norm=grad_norm,
            auxiliary_losses={name: value.detach() for name, value in auxiliary_losses.items()},
            experts=experts,
        )


@torch.no_grad()
def clean_samples(batch: dict, randomness: StepRandomness, vae: AutoencoderKL | None) -> torch.Tensor:
    """Images (b, C, H, W) in [-1, 1], or latents encoded beforehand → x0 (b, C, S, S), mirrored, and in latent space."""
    flips = randomness.flips
    if "mean" in batch:  # each comes with its mirror image
        index = torch.arange(len(flips), device=flips.device)
        mean, std = (batch[name][index, flips.long()] for name in ("mean", "std"))
    else:
        images = torch.where(flips[:, None, None, None], batch["images"].flip(-1), batch["images"])
        if vae is None:
            return images
        mean, std = latent_distribution(vae, images)
    latents = mean + std * randomness.latent_noise.to(std.dtype)
    return scale_latents(vae, latents).float()
