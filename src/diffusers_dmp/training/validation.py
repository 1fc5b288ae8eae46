"""The loss on held-out images: the same timesteps and noise for each of them whenever it is asked for, so that any two
models compare.
"""

import datasets
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from .arguments import TrainingArguments
from .data.images import training_items
from .loop import StepRandomness, clean_samples
from .objectives.ddpm import DiffusionObjective

VALIDATION_SEED = 0  # not the training's, so that trainings of several seeds compare
VALIDATION_BATCH_SIZE = 64


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    objective: DiffusionObjective,
    scheduler,
    dataset: datasets.Dataset,
    args: TrainingArguments,
    vae: AutoencoderKL | None,
    timestep_range: tuple[int, int],
) -> float:
    """
    The mean of `sample_losses` over every image `args.validation_repeats` times, in eval mode, at timesteps that cover
    `timestep_range` evenly. Each process takes its share; what comes out is the same for any number of them, up to rounding.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        model, objective: On the accelerator's device.
        scheduler: Adds the noise.
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        args ([`TrainingArguments`]): For size, columns and workers.
        vae ([`AutoencoderKL`], *optional*): To validate on its latents.
        timestep_range (`tuple[int, int]`): What the model is there for, [low, high).
    """
    items = training_items(dataset, args)
    num_samples = len(dataset) * args.validation_repeats
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    low, high = timestep_range
    timesteps = low + order * (high - low) // num_samples
    own = range(accelerator.process_index, num_samples, accelerator.num_processes)
    loader = DataLoader(
        Subset(ConcatDataset([items] * args.validation_repeats), own),
        VALIDATION_BATCH_SIZE,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # its base seed would be drawn from the global random state
    )
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)

    was_training = model.training
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(loader):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        samples = list(own[number * VALIDATION_BATCH_SIZE :][:VALIDATION_BATCH_SIZE])
        randomness = sample_randomness(samples, timesteps, shape, accelerator.device)
        x0 = clean_samples(batch, randomness, vae)
        x_t = scheduler.add_noise(x0, randomness.noise, randomness.timesteps)
        # a Remix-DiT looks at the timesteps, for which an accelerator would have to be waited
        model_output = model(x_t, timesteps[samples], class_labels=batch.get("class_labels")).sample
        own_columns = {name: batch[name] for name in objective.columns}
        total += objective(model_output, x0, randomness.noise, randomness.timesteps, **own_columns).sample_losses.sum()
    model.train(was_training)
    return accelerator.reduce(total, "sum").item() / num_samples


def sample_randomness(
    samples: list[int], timesteps: torch.LongTensor, shape: tuple[int, int, int], device: torch.device
) -> StepRandomness:
    """What is random of some samples, decided by their indices alone; nothing is mirrored, no label dropped."""
    generators = [torch.Generator().manual_seed(VALIDATION_SEED + 1 + sample) for sample in samples]
    noise, latent_noise = (
        torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device) for _ in range(2)
    )
    nothing = torch.zeros(len(samples), dtype=torch.bool, device=device)
    return StepRandomness(
        timesteps=timesteps[samples].to(device),
        noise=noise,
        latent_noise=latent_noise,
        drop_ids=nothing,
        flips=nothing,
    )
