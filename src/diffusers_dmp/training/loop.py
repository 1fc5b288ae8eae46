"""The training loop: a generator of optimiser steps, which leaves logging, averaging and saving to its caller.

The loop has three seams, so that it knows no system: the objective (noise process and loss), the conditions (what the
denoiser is called with besides the noisy samples) and the denoiser (how it is called, the shape of its samples).

Every random number of a step (flips, colours, the latents' noise, timesteps, noise, dropped conditions) is sampled for the
whole batch from (seed, step) alone, and each process takes its slice. So a run can be cut anywhere and resumed, and any number
of processes and accumulation steps trains on the same batches (but for the timesteps of a recipe that gives each process an
expert).

Legend: B batch size of one optimiser step over all processes, b that of one micro-batch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.utils import BaseOutput
from torch import nn

from .arguments import LoopArguments
from .conditions import Conditions
from .data.clean_samples import clean_samples
from .data.color_jitter import NUM_FACTORS, jitter_colors, jitter_factors
from .denoiser import Denoiser
from .model_flops import ModelFlops
from .objectives.objective import NoisedBatch, Objective, ObjectiveOutput
from .objectives.timesteps import StepExperts
from .recipe import TrainingRecipe
from .sharding import gathered

FLIP_PROB = 0.5


@dataclass
class TrainingStep:
    """
    What one optimiser step did.

    Args:
        step (`int`): The number of steps done.
        loss (`torch.Tensor` of shape ()): The loss of this process's part of the batch.
        sample_losses (`torch.Tensor` of shape (B / processes,)): The loss of each of its samples.
        timesteps (`torch.Tensor` of shape (B / processes,)): Their timesteps.
        grad_norm (`torch.Tensor` of shape (), *optional*): The norm of the gradients before clipping.
        auxiliary_losses (`dict[str, torch.Tensor]`): Unweighted, of this process's last micro-batch.
        experts ([`StepExperts`], *optional*): The experts that it trained.
        flops (`int`, *optional*): The operations of the model on this process's samples; see [`ModelFlops`].
    """

    step: int
    loss: torch.Tensor
    sample_losses: torch.Tensor
    timesteps: torch.Tensor
    grad_norm: torch.Tensor | None
    auxiliary_losses: dict[str, torch.Tensor]
    experts: StepExperts | None
    flops: int | None = None


@dataclass
class StepRandomness:
    """
    The random numbers of one optimiser step for all B samples, or of a slice of them.

    Args:
        timesteps (`torch.Tensor` of shape (B,)): The noise levels.
        noise (`torch.Tensor` of shape (B, …)): ε.
        latent_noise (`torch.Tensor` of shape (B, …), *optional*): For sampling a VAE's posterior.
        dropout (`torch.Tensor` of shape (B,)): Uniform in [0, 1); see [`Conditions`].
        flips (`torch.BoolTensor` of shape (B,)): The samples to mirror.
        jitter (`torch.Tensor` of shape (B, 3), *optional*): The factors of their colours; see [`jitter_colors`].
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    latent_noise: torch.Tensor | None
    dropout: torch.Tensor
    flips: torch.Tensor
    jitter: torch.Tensor | None = None

    def take(self, index: int, count: int) -> "StepRandomness":
        """The `index`-th of `count` equal slices of the batch."""
        return StepRandomness(
            timesteps=self.timesteps.chunk(count)[index],
            noise=self.noise.chunk(count)[index],
            latent_noise=None if self.latent_noise is None else self.latent_noise.chunk(count)[index],
            dropout=self.dropout.chunk(count)[index],
            flips=self.flips.chunk(count)[index],
            jitter=None if self.jitter is None else self.jitter.chunk(count)[index],
        )


@dataclass(kw_only=True)
class TrainingParts:
    """
    What is trained, and by what.

    Args:
        accelerator (`Accelerator`): Of all processes.
        model (`nn.Module`), objective (`nn.Module`), optimizer: As `accelerator.prepare` returned them. The objective is an
            [`Objective`], or wraps one.
        lr_scheduler: Takes one step in each optimiser step.
        recipe ([`TrainingRecipe`]): What the system trains differently.
        denoiser ([`Denoiser`]): How the model is called.
        conditions ([`Conditions`]): What the model is conditioned on.
        vae ([`AutoencoderKL`], *optional*): Frozen, on the accelerator's device, to train on its latents.
        structure (`nn.Module`, *optional*): The model without weights, where those of `model` are sharded.
    """

    accelerator: Accelerator
    model: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    recipe: TrainingRecipe
    denoiser: Denoiser
    conditions: Conditions
    vae: AutoencoderKL | None
    structure: nn.Module | None = None

    @property
    def plain_model(self) -> nn.Module:
        """The model without what `accelerator.prepare` wrapped it in."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def described_model(self) -> nn.Module:
        """The model for its classes, configurations and shapes; it may be without weights."""
        return self.plain_model if self.structure is None else self.structure

    def whole_model(self) -> nn.Module:
        """The model with all of its weights in the main process, to be saved there; every process has to call."""
        if self.structure is None:
            return self.plain_model
        return gathered(self.accelerator, self.model, self.structure)

    def precision(self) -> AbstractContextManager:
        """The mixed precision of a forward pass, where `accelerator.prepare` did not put it into the model."""
        return nullcontext() if self.structure is None else self.accelerator.autocast()

    @property
    def plain_objective(self) -> Objective:
        """The objective without what `accelerator.prepare` wrapped it in."""
        return self.accelerator.unwrap_model(self.objective)

    def step_randomness(
        self, args: LoopArguments, step: int, batch: dict[str, torch.Tensor], experts: StepExperts | None = None
    ) -> StepRandomness:
        """
        The random numbers of a step, as a function of (seed, step) alone on one kind of device; there they lie, too.

        Args:
            args ([`LoopArguments`]): For seed, batch size and flips.
            step (`int`): The number of steps done.
            batch (`dict[str, torch.Tensor]`): A micro-batch of the step: all of them have samples of its shape.
            experts ([`StepExperts`], *optional*): The experts that the step trains.
        """
        device = self.accelerator.device
        (state,) = np.random.SeedSequence([args.seed, step]).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(state))
        shape = (args.batch_size, *self.denoiser.shape_of(batch))
        has_latents = self.vae is not None or "mean" in batch
        color_jitter = getattr(args, "color_jitter", 0.0)  # of images alone
        flip_prob = FLIP_PROB if args.random_flip else 0.0
        # The order matters: with another one, every run would have other random numbers.
        randomness = StepRandomness(
            timesteps=self.plain_objective.sample_timesteps(args.batch_size, generator, experts, shape[1:]),
            noise=torch.randn(shape, generator=generator, device=device),
            latent_noise=torch.randn(shape, generator=generator, device=device) if has_latents else None,
            dropout=torch.rand(args.batch_size, generator=generator, device=device),
            flips=torch.rand(args.batch_size, generator=generator, device=device) < flip_prob,
        )
        if color_jitter:
            uniform = torch.rand(args.batch_size, NUM_FACTORS, generator=generator, device=device)
            randomness.jitter = jitter_factors(uniform, color_jitter)
        return randomness

    def losses(
        self, batch: dict[str, torch.Tensor], own: StepRandomness, expert: int | None = None
    ) -> tuple[ObjectiveOutput, BaseOutput]:
        """
        The losses of a micro-batch in training, and the model's output, which may have auxiliary losses.

        Args:
            batch (`dict[str, torch.Tensor]`): The columns of b samples, on the accelerator's device.
            own ([`StepRandomness`]): The random numbers of those samples.
            expert (`int`, *optional*): The expert that owns their timesteps, for a model that takes it as an argument.
        """
        if own.jitter is not None:
            batch = batch | {"images": jitter_colors(batch["images"], own.jitter)}
        x0 = clean_samples(batch, own.flips, own.latent_noise, self.vae)
        x_t = self.plain_objective.add_noise(x0, own.noise, own.timesteps)
        conditions = self.conditions(batch, own.dropout)
        with self.precision():
            model_output = self.denoiser(self.model, x_t, own.timesteps, conditions, expert)
        noised = NoisedBatch(x0, own.noise, own.timesteps, batch)
        return self.objective(model_output.sample, noised), model_output


def training_steps(
    parts: TrainingParts, args: LoopArguments, batches: Iterator[dict[str, torch.Tensor]], first_step: int
) -> Iterator[TrainingStep]:
    """
    Train: one optimiser step for each item that is asked for.

    Args:
        parts ([`TrainingParts`]): What is trained, and by what.
        args ([`LoopArguments`]): For batch size, seed, flips, clipping and the last step.
        batches (`Iterator[dict]`): This process's micro-batches, of the columns that [`clean_samples`], the conditions and
            the objective read.
        first_step (`int`): The first step to do.
    """
    accelerator = parts.accelerator
    num_accumulated = accelerator.gradient_accumulation_steps
    num_slices = accelerator.num_processes * num_accumulated
    synchronised = [parts.model] if parts.structure is not None else [parts.model, parts.objective]
    parts.model.train()
    count_flops = ModelFlops(parts)

    for step in range(first_step, args.max_train_steps):
        experts = parts.recipe.step_experts(args.seed, step, accelerator.num_processes, args.batch_size)
        own_expert = parts.recipe.expert_argument(experts, accelerator.process_index)
        auxiliary_weights = parts.recipe.auxiliary_weights(step)
        losses, sample_losses, timesteps, grad_norm = [], [], [], None
        flops: int | None = 0
        auxiliary_losses: dict[str, torch.Tensor] = {}
        for micro_step in range(num_accumulated):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(batches).items()}
            if micro_step == 0:
                randomness = parts.step_randomness(args, step, batch, experts)
            own = randomness.take(accelerator.process_index * num_accumulated + micro_step, num_slices)
            own_flops = count_flops(batch, own, own_expert)
            flops = None if flops is None or own_flops is None else flops + own_flops

            with accelerator.accumulate(*synchronised):
                output, model_output = parts.losses(batch, own, own_expert)
                auxiliary_losses = {name: model_output[name] for name in auxiliary_weights}
                auxiliary_loss = sum(auxiliary_weights[name] * value for name, value in auxiliary_losses.items())
                accelerator.backward(output.loss + auxiliary_loss)
                if accelerator.sync_gradients and args.max_grad_norm is not None:
                    grad_norm = accelerator.clip_grad_norm_(parts.model.parameters(), args.max_grad_norm)
                parts.optimizer.step()
                parts.optimizer.zero_grad()

            losses.append(output.loss.detach())
            sample_losses.append(output.sample_losses.detach())
            timesteps.append(own.timesteps)
        parts.lr_scheduler.step()
        yield TrainingStep(
            step=step + 1,
            loss=torch.stack(losses).mean(),
            sample_losses=torch.cat(sample_losses),
            timesteps=torch.cat(timesteps),
            grad_norm=grad_norm,
            auxiliary_losses={name: value.detach() for name, value in auxiliary_losses.items()},
            experts=experts,
            flops=flops,
        )
