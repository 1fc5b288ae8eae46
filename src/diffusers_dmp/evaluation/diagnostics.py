"""What each part of a trained model is good at, and how often it is at work.

Legend: N images, E experts, K bands of timesteps.
"""

from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from torch import nn

from ..diffusion.latents import scale_latents
from ..diffusion.noise import noisy_sample
from ..diffusion.predictions import convert_prediction, expected_prediction_type
from ..intervals import NoiseIntervals
from ..models import RemixDiTModel
from ..pipelines import ClassConditionalPipeline, SNRSplitPipeline
from ..training.data.images import to_tensors
from ..training.data.latents import latent_distribution

BATCH_SIZE = 64
SEED = 0  # of the noise, which is the same for whoever is asked


@dataclass(frozen=True)
class Diagnosis:
    """
    Args:
        stretches (`list[float]` of length E + 1): Expert e owns the timesteps [stretches[e], stretches[e + 1]).
        bands (`list[float]` of length K + 1): Edges of the bands of timesteps, all of one length.
        band_losses (`list[list[float]]` of shape (E, K)): Mean squared error of the predicted noise, by expert and band, the
            expert's own or not.
        swap_losses (`list[list[float]]` of shape (E, E)): Row i: the same over the stretch of expert i, if expert j has it.
        sampling_steps (`list[int]` of length E): How many of the denoising steps each has.
        training_samples (`list[int]` of length E, *optional*): How many samples each was trained on.
    """

    stretches: list[float]
    bands: list[float]
    band_losses: list[list[float]]
    swap_losses: list[list[float]]
    sampling_steps: list[int]
    training_samples: list[int] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def diagnose(
    pipeline: "ClassConditionalPipeline | SNRSplitPipeline",
    dataset: datasets.Dataset,
    num_images: int = 256,
    num_bands: int = 8,
    num_inference_steps: int = 50,
    training_summary: dict[str, Any] | None = None,
) -> Diagnosis:
    """
    Ask every expert to denoise everybody's noise. A model of one part is one expert for all timesteps.

    Args:
        pipeline: With a scheduler that has `alphas_cumprod`, on the device to compute on.
        dataset (`datasets.Dataset`): As [`load_images`] returns it; with labels, if the pipeline knows classes.
        num_images (`int`): N, drawn at random; each is seen once in every band and stretch, at timesteps that cover it evenly.
        num_bands (`int`): K.
        num_inference_steps (`int`): Of the sampling that is counted.
        training_summary (`dict`, *optional*): What `training_summary.json` holds.

    Raises:
        ValueError: if the data set has no labels, which the pipeline needs, or no images.
    """
    intervals, experts, types = _experts(pipeline)
    x0, labels = _clean_samples(pipeline, dataset, num_images)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED)).to(x0.device)
    bands = NoiseIntervals.uniform(num_bands, pipeline.scheduler.config.num_train_timesteps).edges

    def losses(edges: tuple[float, ...]) -> torch.Tensor:
        """(E, len(edges) - 1)"""
        rows = []
        for expert, own_type in zip(experts, types):
            row = []
            for low, high in zip(edges, edges[1:]):
                timesteps = (low + (torch.arange(len(x0)) + 0.5) / len(x0) * (high - low)).long()
                row.append(_noise_loss(expert, own_type, pipeline.scheduler, x0, noise, timesteps, labels))
            rows.append(row)
        return torch.tensor(rows)

    timesteps = _timesteps(pipeline, num_inference_steps)
    steps = intervals.index(timesteps).bincount(minlength=len(experts))
    return Diagnosis(
        stretches=list(intervals.edges),
        bands=list(bands),
        band_losses=losses(bands).tolist(),
        swap_losses=losses(intervals.edges).T.tolist(),
        sampling_steps=steps.tolist(),
        training_samples=_training_samples(training_summary or {}),
    )


def _experts(pipeline) -> tuple[NoiseIntervals, list[nn.Module], list[str]]:
    """Who owns what, the experts as models of one part, and what each predicts."""
    if isinstance(pipeline, SNRSplitPipeline):
        return pipeline.intervals(), pipeline.denoisers, pipeline.config.prediction_types
    model = pipeline.denoisers[0]
    own_type = model.config.get("prediction_type") or expected_prediction_type(pipeline.scheduler)
    if isinstance(model, RemixDiTModel):
        experts = [model.bake_expert(expert) for expert in range(model.config.num_experts)]
        return model.intervals, experts, [own_type] * len(experts)
    return NoiseIntervals.uniform(1, pipeline.scheduler.config.num_train_timesteps), [model], [own_type]


@torch.no_grad()
def _clean_samples(pipeline, dataset: datasets.Dataset, num_images: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x0 (N, C, H, W), and labels (N,) for a model that knows classes."""
    model = pipeline.denoisers[0]
    own_size = model.config.sample_size
    own_size = own_size if isinstance(own_size, int) else own_size[0]
    size, channels = own_size * pipeline.vae_scale_factor, model.config.in_channels
    if pipeline.vae is not None:
        channels = pipeline.vae.config.in_channels
    if not len(dataset):
        raise ValueError("Expected `dataset` to hold images, but got none.")
    some = dataset.shuffle(seed=SEED).select(range(min(num_images, len(dataset))))  # most are sorted by class
    items = to_tensors(some, size, channels)
    images = torch.stack([item["images"] for item in items])
    labels = None
    if (pipeline.num_classes or 1) > 1:
        if "class_labels" not in items[0]:
            raise ValueError(
                f"Expected `dataset` to have labels for a model of {pipeline.num_classes} classes, but got none."
            )
        labels = torch.tensor([item["class_labels"] for item in items])
    if pipeline.vae is not None:
        means = [
            latent_distribution(pipeline.vae, part.to(pipeline.vae.device))[0] for part in images.split(BATCH_SIZE)
        ]
        return scale_latents(pipeline.vae, torch.cat(means)).float(), labels
    return images.to(model.device), labels


@torch.no_grad()
def _noise_loss(model: nn.Module, own_type: str, scheduler, x0, noise, timesteps, labels) -> float:
    """Of ε, whatever the model predicts: (N, C, H, W) → mean squared error."""
    alphas_cumprod = scheduler.alphas_cumprod.to(x0.device)[timesteps.to(x0.device)].view(-1, 1, 1, 1)
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    x_t = noisy_sample(x0, noise, alpha, sigma)
    total = 0.0
    for rows in torch.arange(len(x0)).split(BATCH_SIZE):
        kwargs = {} if labels is None else {"class_labels": labels[rows]}
        output = model(x_t[rows].to(model.dtype), timesteps[rows], **kwargs).sample[:, : x0.shape[1]].float()
        epsilon = convert_prediction(output, x_t[rows], alpha[rows], sigma[rows], own_type, "epsilon")
        total += float((epsilon - noise[rows]).square().mean((1, 2, 3)).sum())
    return total / len(x0)


def _timesteps(pipeline, num_inference_steps: int) -> torch.Tensor:
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler.timesteps.cpu()


def _training_samples(summary: dict[str, Any]) -> list[int] | None:
    """Of one training with several experts, or of several trainings with one expert each."""
    if "experts" in summary:
        return [sum(each["samples_per_expert"]) for each in summary["experts"]]
    return summary.get("samples_per_expert")
