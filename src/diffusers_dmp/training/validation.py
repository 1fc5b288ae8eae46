"""The loss on held-out images, comparable between any two models.

Each image has the same timesteps and noise every time; they do not depend on the training's seed.
"""

import datasets
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from .arguments import SharedTrainingArguments
from .data.clean_samples import clean_samples
from .data.images import training_items
from .interruption import ignore_signals
from .loop import TrainingParts
from .objectives.objective import NoisedBatch

VALIDATION_SEED = 0  # independent of the training's seed, so that trainings with several seeds compare
VALIDATION_BATCH_SIZE = 64


@torch.no_grad()
def validation_loss(parts: TrainingParts, args: SharedTrainingArguments, dataset: datasets.Dataset) -> float:
    """
    The mean loss of all images, each noised `args.validation_repeats` times, in eval mode.

    The timesteps cover the range that the model is trained on evenly. No image is mirrored and no condition dropped. Each
    process takes its share; the result is the same for any number of them, up to rounding.

    Args:
        parts ([`TrainingParts`]): The model and how it is called, in every process, each of which has to call.
        args ([`SharedTrainingArguments`]): For image size, columns, workers and repeats.
        dataset (`datasets.Dataset`): The held-out images, as [`load_images`] returns them.
    """
    accelerator, model, objective = parts.accelerator, parts.plain_model, parts.plain_objective
    items = training_items(dataset, args)
    num_samples = len(dataset) * args.validation_repeats
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    low, high = parts.recipe.noise_range(args.num_train_timesteps)
    timesteps = objective.evenly_spaced_timesteps(num_samples, low, high)[order]
    own = range(accelerator.process_index, num_samples, accelerator.num_processes)
    loader: DataLoader[dict[str, torch.Tensor]] = DataLoader(
        Subset(ConcatDataset([items] * args.validation_repeats), own),
        VALIDATION_BATCH_SIZE,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # without one, the loader would change the global random state
    )

    was_training = model.training
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(loader):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        samples = list(own[number * VALIDATION_BATCH_SIZE :][:VALIDATION_BATCH_SIZE])
        noise, latent_noise = (each.to(accelerator.device) for each in sample_noise(samples, parts))
        own_timesteps = timesteps[samples].to(accelerator.device)
        no_flips = torch.zeros(len(samples), dtype=torch.bool, device=accelerator.device)
        x0 = clean_samples(batch, no_flips, latent_noise, parts.vae)
        x_t = objective.add_noise(x0, noise, own_timesteps)
        # timesteps on the CPU: a Remix-DiT reads them, which would make the CPU wait for an accelerator
        model_output = parts.denoiser(model, x_t, timesteps[samples], parts.conditions(batch))
        noised = NoisedBatch(x0, noise, own_timesteps, batch)
        total += objective(model_output.sample, noised).sample_losses.sum()
    model.train(was_training)
    return accelerator.reduce(total, "sum").item() / num_samples


def sample_noise(samples: list[int], parts: TrainingParts) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise of some samples and of their latents, (b, …) each, as a function of the samples' indices alone."""
    generators = [torch.Generator().manual_seed(VALIDATION_SEED + 1 + sample) for sample in samples]
    shape = parts.denoiser.sample_shape
    noise, latent_noise = (
        torch.stack([torch.randn(shape, generator=generator) for generator in generators]) for _ in range(2)
    )
    return noise, latent_noise
