"""The loss on held-out samples, comparable between any two models.

Each sample has the same timesteps and noise every time; they do not depend on the training's seed.
"""

from itertools import repeat
from typing import Any

import torch

from .arguments import LoopArguments
from .data.clean_samples import clean_samples
from .data.loop_data import LoopData
from .loop import TrainingParts
from .objectives.objective import NoisedBatch
from .sharding import equally_often, reshard, with_all_experts

VALIDATION_SEED = 0  # independent of the training's seed, so that trainings with several seeds compare
VALIDATION_LOSS = "validation_loss"


@torch.no_grad()
def validation_losses(parts: TrainingParts, args: LoopArguments, data: LoopData) -> dict[str, float]:
    """
    The mean loss of all held-out samples, each noised `args.validation_repeats` times, in eval mode.

    The timesteps cover the range that the model is trained on evenly. No sample is mirrored and no condition dropped. Each
    process takes its share; the result is the same for any number of them, up to rounding.

    Args:
        parts ([`TrainingParts`]): The model and how it is called, in every process, each of which has to call.
        args ([`LoopArguments`]): For workers and repeats.
        data ([`LoopData`]): With held-out samples.

    Returns:
        `dict[str, float]`: `validation_loss`, and if there are several experts, the loss in the interval of each one that is
        trained, such as `validation_loss/0-875`.
    """
    accelerator, model, objective = parts.accelerator, parts.plain_model, parts.plain_objective
    num_samples = data.num_validation_samples(args)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    intervals = parts.recipe.expert_intervals or objective.train_intervals
    low, high = parts.recipe.noise_range(intervals.num_train_timesteps)
    timesteps = objective.evenly_spaced_timesteps(num_samples, low, high)[order]
    experts = intervals.index(timesteps) if parts.recipe.expert_intervals is not None else torch.zeros_like(order)

    is_sharded = parts.structure is not None
    was_training = model.training
    model.eval()
    totals = torch.zeros(intervals.num_experts, device=accelerator.device)
    batches: Any = data.validation_batches(accelerator, args)
    for (samples, batch), is_new in equally_often(accelerator, batches) if is_sharded else zip(batches, repeat(True)):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        shape = parts.denoiser.shape_of(batch)
        noise, latent_noise = (each.to(accelerator.device) for each in sample_noise(samples, shape))
        own_timesteps = timesteps[samples].to(accelerator.device)
        no_flips = torch.zeros(len(samples), dtype=torch.bool, device=accelerator.device)
        x0 = clean_samples(batch, no_flips, latent_noise, parts.vae)
        x_t = objective.add_noise(x0, noise, own_timesteps)
        # timesteps on the CPU: a Remix-DiT reads them, which would make the CPU wait for an accelerator
        called = x_t, timesteps[samples], parts.conditions(batch)
        if is_sharded and parts.recipe.expert_intervals is not None:
            called = with_all_experts(intervals, *called)
        with parts.precision():
            prediction = parts.denoiser(model, *called).sample[: len(samples)]
        losses = objective(prediction, NoisedBatch(x0, noise, own_timesteps, batch)).sample_losses
        if is_new:
            totals.index_add_(0, experts[samples].to(accelerator.device), losses.to(totals.dtype))
    model.train(was_training)
    reshard(model)

    sums = accelerator.reduce(totals, "sum").tolist()
    measured = {VALIDATION_LOSS: sum(sums) / num_samples}
    counts = experts.bincount(minlength=intervals.num_experts).tolist()
    if parts.recipe.expert_intervals is not None and intervals.num_experts > 1:
        for begin, end, total, count in zip(intervals.edges, intervals.edges[1:], sums, counts):
            if count:
                measured[f"{VALIDATION_LOSS}/{begin:g}-{end:g}"] = total / count
    return measured


def sample_noise(samples: list[int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise of some samples and of their latents, (b, *shape) each, as a function of the samples' indices alone."""
    generators = [torch.Generator().manual_seed(VALIDATION_SEED + 1 + sample) for sample in samples]
    noise, latent_noise = (
        torch.stack([torch.randn(shape, generator=generator) for generator in generators]) for _ in range(2)
    )
    return noise, latent_noise
