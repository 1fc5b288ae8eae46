"""The loss on held-out images: the same images, timesteps and noise whenever it is asked for, so that models compare."""

import datasets
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from .arguments import TrainingArguments
from .data import to_tensors
from .loop import StepRandomness, clean_samples
from .objective import DiffusionObjective


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    objective: DiffusionObjective,
    scheduler,
    dataset: datasets.Dataset,
    args: TrainingArguments,
    vae: AutoencoderKL | None,
    device: torch.device,
) -> float:
    """
    The mean of `sample_losses` over every image `args.validation_repeats` times, in eval mode, at timesteps that cover all
    of them evenly.

    Args:
        model, objective: On `device`.
        scheduler: Adds the noise.
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        args ([`TrainingArguments`]): For the size, batch size, columns and seed.
        vae ([`AutoencoderKL`], *optional*): To validate on its latents.
    """
    items = to_tensors(dataset, args.image_size, args.image_channels, args.image_column, args.label_column)
    generator = torch.Generator().manual_seed(args.seed)
    num_samples = len(dataset) * args.validation_repeats
    order = torch.randperm(num_samples, generator=generator)
    timesteps = order * args.num_train_timesteps // num_samples

    was_training = model.training
    model.eval()
    losses = []
    loader = DataLoader(ConcatDataset([items] * args.validation_repeats), args.batch_size, generator=generator)
    for batch, t in zip(loader, timesteps.split(args.batch_size)):
        batch = {name: value.to(device) for name, value in batch.items()}
        shape = (len(t), model.config.in_channels, model.config.sample_size, model.config.sample_size)
        noise, latent_noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        randomness = StepRandomness(
            timesteps=t.to(device),
            noise=noise,
            latent_noise=latent_noise,
            drop_ids=torch.zeros(len(t), dtype=torch.bool, device=device),
            flips=torch.zeros(len(t), dtype=torch.bool, device=device),
        )
        x0 = clean_samples(batch, randomness, vae)
        x_t = scheduler.add_noise(x0, noise, randomness.timesteps)
        model_output = model(x_t, t, class_labels=batch.get("class_labels")).sample
        losses.append(objective(model_output, x0, noise, randomness.timesteps).sample_losses)
    model.train(was_training)
    return torch.cat(losses).mean().item()
