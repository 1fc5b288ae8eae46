"""How well each expert of a trained pipeline denoises at each noise level, and how often it is used.

Legend: N images, E experts, K bands of timesteps, C channels, H and W height and width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from diffusers.models.modeling_utils import ModelMixin

from ..diffusion.latents import scale_latents
from ..diffusion.noise import is_flow_matching, levels_at, noisy_sample
from ..diffusion.predictions import convert_prediction, flow_velocity
from ..intervals import NoiseIntervals
from ..models.inputs import has_classes
from ..pipelines.expert_steps import steps_per_expert
from ..saving.reading import read_json
from ..systems import systems_in
from ..training.arguments import DataArguments
from ..training.data.folders import LABEL
from ..training.data.images import LATENTS, to_tensors
from ..training.data.latents import ENCODING_NAME, latent_distribution

if TYPE_CHECKING:
    from ..pipelines import ClassConditionalPipeline, SNRSplitPipeline

BATCH_SIZE = 64
SEED = 0  # of the images and their noise, the same for every expert


@dataclass(frozen=True)
class Diagnosis:
    """
    Losses and use of each expert. A loss is the mean squared error of the predicted noise; for flow matching, of the velocity.

    Args:
        edges (`list[float]` of length E + 1): Expert e owns the timesteps [edges[e], edges[e + 1]).
        bands (`list[float]` of length K + 1): The edges of the bands of timesteps, all of one length.
        band_losses (`list[list[float]]` of shape (E, K)): The loss of each expert in each band, whether it owns the band or
            not.
        swap_losses (`list[list[float]]` of shape (E, E)): Row i, column j: the loss in the interval of expert i if expert j
            denoises there.
        sampling_steps (`list[int]` of length E): The number of denoising steps of each expert.
        training_samples (`list[int]` of length E, *optional*): The number of samples that each expert was trained on.
        base_losses (`list[float]` of length E, *optional*): The loss in each interval of the denoiser without its LoRAs.
        base_band_losses (`list[float]` of length K, *optional*): The same in each band.
    """

    edges: list[float]
    bands: list[float]
    band_losses: list[list[float]]
    swap_losses: list[list[float]]
    sampling_steps: list[int]
    training_samples: list[int] | None
    base_losses: list[float] | None = None
    base_band_losses: list[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return asdict(self)


def diagnose(
    pipeline: "ClassConditionalPipeline | SNRSplitPipeline",
    dataset: datasets.Dataset,
    num_images: int = 256,
    num_bands: int = 8,
    num_inference_steps: int = 50,
    training_summary: dict[str, Any] | None = None,
    **reading: str,
) -> Diagnosis:
    """
    Measure the loss of every expert at all noise levels. A model without experts counts as one expert.

    Args:
        pipeline: The pipeline, on the device to compute on.
        dataset (`datasets.Dataset`): Images as [`load_images`] returns them; with labels if the pipeline knows classes.
        num_images (`int`): N, chosen at random. Each image is used once per band and per interval, at timesteps that cover it
            evenly.
        num_bands (`int`): K.
        num_inference_steps (`int`): The length of the sampling whose steps are counted.
        training_summary (`dict`, *optional*): The content of `training_summary.json`.
        reading (`str`): `image_column`, `label_column`, `image_fit` and `background`: the data set's columns, and how the
            model's training made an image of a file; see [`ImageReader`].

    Raises:
        ValueError: if the data set has no images, or no labels although the pipeline needs them, the pipeline is of another
            class, or its experts are LoRAs.
    """
    if not hasattr(pipeline, "denoisers"):
        raise ValueError(
            f"Expected a ClassConditionalPipeline or SNRSplitPipeline, but got a {type(pipeline).__name__}, whose denoiser takes "
            "more than images and labels; `diffusers_dmp.evaluation.denoiser_diagnostics.diagnose_denoiser` takes any."
        )
    intervals, experts = _experts(pipeline)
    samples = _clean_samples(pipeline, dataset, num_images, **reading)
    scheduler = pipeline.scheduler
    losses = [partial(_noise_loss, *expert, scheduler, samples) for expert in experts]
    steps = steps_per_expert(intervals, scheduler, num_inference_steps)
    return diagnosis_of(losses, intervals, steps, num_bands, training_samples_in(training_summary or {}))


def diagnosis_of(
    losses: Sequence[Callable[[float, float], float]],
    intervals: NoiseIntervals,
    sampling_steps: list[int],
    num_bands: int,
    training_samples: list[int] | None = None,
) -> Diagnosis:
    """
    Measure the losses of experts in bands of timesteps and in one another's intervals.

    Args:
        losses (`Sequence[Callable]` of length E): For each expert, its loss at timesteps that cover [low, high) evenly.
        intervals ([`NoiseIntervals`]): Which expert owns which timesteps.
        sampling_steps, training_samples (`list[int]` of length E): As in [`Diagnosis`].
        num_bands (`int`): K.
    """
    bands = NoiseIntervals.uniform(num_bands, intervals.num_train_timesteps).edges

    def between(edges: tuple[float, ...]) -> list[list[float]]:
        """The losses (E, len(edges) - 1) of all experts between neighbouring edges."""
        return [[loss(low, high) for low, high in zip(edges, edges[1:])] for loss in losses]

    return Diagnosis(
        edges=list(intervals.edges),
        bands=list(bands),
        band_losses=between(bands),
        swap_losses=[list(row) for row in zip(*between(intervals.edges))],
        sampling_steps=sampling_steps,
        training_samples=training_samples,
    )


def band_losses(
    pipeline: "ClassConditionalPipeline | SNRSplitPipeline",
    dataset: datasets.Dataset,
    num_images: int = 256,
    num_bands: int = 8,
    **reading: str,
) -> list[float]:
    """
    Measure the loss of a whole pipeline by noise level: everywhere that of the expert that owns the noise level.

    Args:
        pipeline, dataset, num_images, num_bands, reading: See [`diagnose`].

    Returns:
        `list[float]` of length K: The mean squared error of the predicted noise in each band of timesteps.

    Raises:
        ValueError: see [`diagnose`].
    """
    intervals, experts = _experts(pipeline)
    samples = _clean_samples(pipeline, dataset, num_images, **reading)
    bands = NoiseIntervals.uniform(num_bands, intervals.num_train_timesteps)
    edges = sorted({*bands.edges, *intervals.edges})
    losses = [0.0] * num_bands
    for low, high in zip(edges, edges[1:]):
        middle = torch.tensor([(low + high) / 2])
        owner, band = int(intervals.index(middle)), int(bands.index(middle))
        share = (high - low) / (bands.edges[band + 1] - bands.edges[band])
        losses[band] += share * _noise_loss(*experts[owner], pipeline.scheduler, samples, low, high)
    return losses


def reading_of_training(training: dict[str, Any]) -> dict[str, str]:
    """
    How a training made images of its files: `image_fit` and `background`, of which its latents' encoding decides if it had any.

    Args:
        training (`dict`): The content of its `training_arguments.yaml`; empty if it is not known.
    """
    encoding = Path(training.get("dataset") or "", ENCODING_NAME)
    decided = read_json(encoding) if encoding.is_file() else training
    return {name: decided.get(name, getattr(DataArguments, name)) for name in ("image_fit", "background")}


@dataclass(frozen=True)
class _Samples:
    """
    Clean samples with their noise and labels.

    Args:
        x0, noise (`torch.Tensor` of shape (N, C, H, W)): Clean samples, in pixels or latents, and ε.
        labels (`torch.Tensor` of shape (N,), *optional*): Classes, on the CPU.
    """

    x0: torch.Tensor
    noise: torch.Tensor
    labels: torch.Tensor | None


def _experts(pipeline: Any) -> tuple[NoiseIntervals, list[tuple[ModelMixin, str]]]:
    """The intervals, and for each of them the model that owns it and its prediction type."""
    system, part = next((system, part) for system, part in systems_in(pipeline) if not system.is_guidance)
    whole = NoiseIntervals.uniform(1, pipeline.scheduler.config.num_train_timesteps)
    intervals = whole if system.intervals is None else system.intervals(part)
    experts = system.experts(pipeline, part)
    if len(experts) != intervals.num_experts:  # LoRAs
        raise ValueError(
            f"Expected a model for each of {intervals.num_experts} intervals, but got {system.title} on one model; "
            "`diffusers_dmp.evaluation.denoiser_diagnostics.diagnose_denoiser` diagnoses them."
        )
    return intervals, experts


@torch.no_grad()
def _clean_samples(pipeline: Any, dataset: datasets.Dataset, num_images: int, **reading: str) -> _Samples:
    model = pipeline.denoisers[0]
    sample_size = model.config.sample_size
    sample_size = sample_size if isinstance(sample_size, int) else sample_size[0]
    size, channels = sample_size * pipeline.vae_scale_factor, model.config.in_channels
    if pipeline.vae is not None:
        channels = pipeline.vae.config.in_channels
    if not len(dataset):
        raise ValueError("Expected `dataset` to hold images, but got none.")
    if LATENTS in dataset.column_names:
        raise ValueError("Expected `dataset` to hold images, but got latents; give the images that were encoded.")
    # shuffled, because most data sets are sorted by class
    subset = dataset.shuffle(seed=SEED).select(range(min(num_images, len(dataset))))
    items = to_tensors(subset, size, channels, **reading)
    x0 = torch.stack([item["images"] for item in items])
    labels = None
    if has_classes(pipeline.num_classes):
        if "class_labels" not in items[0]:
            raise ValueError(
                f"Expected `dataset` to have labels in the column {reading.get('label_column', LABEL)!r} for a model of "
                f"{pipeline.num_classes} classes, but got the columns {dataset.column_names}."
            )
        labels = torch.tensor([item["class_labels"] for item in items])
    if pipeline.vae is None:
        x0 = x0.to(model.device)
    else:
        device = pipeline.vae.device
        means = [latent_distribution(pipeline.vae, part.to(device))[0] for part in x0.split(BATCH_SIZE)]
        x0 = scale_latents(pipeline.vae, torch.cat(means)).float()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED)).to(x0.device)
    return _Samples(x0, noise, labels)


def timesteps_between(low: float, high: float, num_samples: int, is_continuous: bool) -> torch.Tensor:
    """Spread N timesteps evenly over [low, high): whole numbers unless the process is continuous in time."""
    timesteps = low + (torch.arange(num_samples) + 0.5) / num_samples * (high - low)
    return timesteps if is_continuous else timesteps.long().clamp(min=math.ceil(low))


def prediction_error(
    output: torch.Tensor,
    x_t: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    levels: tuple[torch.Tensor, torch.Tensor],
    prediction_type: str,
) -> torch.Tensor:
    """
    Compute the mean squared error of the predicted noise, or of the velocity for flow matching, of each sample.

    Args:
        output (`torch.Tensor` of shape (B, …)): What a denoiser predicts.
        x_t, x0, noise (`torch.Tensor` of the same shape): Noisy samples, clean samples and ε.
        levels (`tuple` of two `torch.Tensor`, broadcastable to them): α and σ.
        prediction_type (`str`): What it predicts, of `PREDICTION_TYPES` or "flow_prediction".

    Returns:
        `torch.Tensor` of shape (B,).
    """
    if prediction_type == "flow_prediction":
        return (output - flow_velocity(x0, noise)).square().flatten(1).mean(1)
    epsilon = convert_prediction(output, x_t, *levels, prediction_type, "epsilon")
    return (epsilon - noise).square().flatten(1).mean(1)


@torch.no_grad()
def _noise_loss(
    model: ModelMixin, prediction_type: str, scheduler: Any, samples: _Samples, low: float, high: float
) -> float:
    """The mean squared error of the noise that a model predicts, at timesteps that cover [low, high) evenly."""
    x0, noise, labels = samples.x0, samples.noise, samples.labels
    num_samples, num_channels = x0.shape[:2]
    timesteps = timesteps_between(low, high, num_samples, is_flow_matching(scheduler))  # (N,)
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in levels_at(scheduler, timesteps.to(x0.device)))
    x_t = noisy_sample(x0, noise, alpha, sigma)
    total = 0.0
    for rows in torch.arange(num_samples).split(BATCH_SIZE):
        kwargs = {} if labels is None else {"class_labels": labels[rows]}
        # a learned variance follows in further channels
        output = model(x_t[rows].to(model.dtype), timesteps[rows], **kwargs).sample[:, :num_channels].float()
        levels = alpha[rows], sigma[rows]
        total += float(prediction_error(output, x_t[rows], x0[rows], noise[rows], levels, prediction_type).sum())
    return total / num_samples


def training_samples_in(summary: dict[str, Any]) -> list[int] | None:
    """Read from a summary how many samples each expert was trained on, in one training or in one training per expert."""
    if "experts" in summary:
        return [sum(each["samples_per_expert"]) for each in summary["experts"]]
    return summary.get("samples_per_expert")
