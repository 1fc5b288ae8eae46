"""The diagnosis of a text pipeline's experts on encoded images and captions: which LoRA or denoiser acts where, and how well.

Legend: N samples, n those of one shape, M 1 or 2, C channels, F frames (videos only), h and w height and width of the latents.
"""

import dataclasses
import inspect
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import get_device

from ..intervals import NoiseIntervals
from ..models.precision import check_dtype, dtype_named
from ..plugins.lora_experts import LoraExperts
from ..saving.finite import expect_finite_pipeline
from ..saving.pipeline_parts import load_components, saved_class
from ..saving.reading import read_json
from ..saving.weight_files import check_saved_folder
from ..training.conditions import LATENT_COLUMNS
from ..training.data.clean_samples import clean_samples
from ..training.data.encoded_rows import collate
from ..training.data.encoded_text import Encoded, batches_of_one_bucket, check_shapes
from ..training.data.encoding_record import check_encoding
from ..training.data.prompts import PROMPT
from ..training.objectives.shifts import ResolutionShift
from ..training.summary import SUMMARY_NAME
from ..training.text_pipelines import TextPipeline, text_pipeline_of
from .denoiser_diagnostics import DiagnosisOptions, diagnose_batches, losses_between
from .diagnostics import SEED, Diagnosis, training_samples_in

BATCH_SIZE = 8

Columns = Mapping[str, torch.Tensor]


@torch.no_grad()
def diagnose_text_pipeline(
    pipeline: DiffusionPipeline,
    batches: Sequence[Columns],
    experts: LoraExperts | None = None,
    num_bands: int = 8,
    num_inference_steps: int = 50,
) -> Diagnosis:
    """
    Measure the loss of every expert of a text pipeline at all noise levels.

    Args:
        pipeline ([`DiffusionPipeline`]): Of a family that can be trained, on the device to compute on; its text encoders and VAE
            are not needed. Its experts are its two denoisers (Wan 2.2), those of a [`DenoiserExperts`], or LoRAs.
        batches (of `Mapping[str, torch.Tensor]`): The samples, as many at once as are denoised at once, as batches of a training:
            `mean` and `std` (n, M, C, [F,] h, w), and the columns of the prompts (n, …).
        experts ([`LoraExperts`], *optional*): LoRAs to attach for the diagnosis. The denoiser is measured without them, too.
        num_bands (`int`): The number of bands of timesteps.
        num_inference_steps (`int`): The length of the sampling whose steps are counted, for the most frequent shape.

    Returns:
        [`Diagnosis`]: The losses are mean squared errors of the predicted noise, or of the velocity for flow matching.

    Raises:
        ValueError: if the family of the pipeline is not known, or LoRAs are given for two denoisers.
    """
    text, scheduler = text_pipeline_of(pipeline), pipeline.scheduler
    denoiser, intervals = _denoiser(pipeline, text)
    if experts is not None and intervals is not None:
        raise ValueError(
            "Expected no LoRA experts for a pipeline of two denoisers, but got some; diagnose either of them alone."
        )
    generator = torch.Generator().manual_seed(SEED + 1)  # not that of the noise
    inputs = [_samples_and_conditions(batch, generator, pipeline.device) for batch in batches]

    def predict(denoiser: Any, x_t: torch.Tensor, time: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        own = {name: each.to(x_t.dtype) if each.is_floating_point() else each for name, each in conditions.items()}
        return text.call(denoiser, denoiser.config, x_t, time, own)

    options = DiagnosisOptions(intervals=intervals, predict=predict, num_bands=num_bands)
    config = (denoiser if intervals is None else denoiser[0]).config
    schedule = _schedule(scheduler, text.token_size(config), inputs)
    if experts is None:
        return diagnose_batches(denoiser, inputs, scheduler, num_inference_steps, options, **schedule)
    bands = NoiseIntervals.uniform(num_bands, experts.intervals.num_train_timesteps)
    base_losses, base_band_losses = (
        losses_between(denoiser, inputs, scheduler, each.edges, options) for each in (experts.intervals, bands)
    )
    experts.attach(pipeline)
    try:
        diagnosis = diagnose_batches(denoiser, inputs, scheduler, num_inference_steps, options, **schedule)
    finally:
        experts.detach()
    return dataclasses.replace(diagnosis, base_losses=base_losses, base_band_losses=base_band_losses)


def _denoiser(pipeline: Any, text: TextPipeline) -> tuple[Any, NoiseIntervals | None]:
    """The denoiser; or two, that for the least noise first, and their intervals."""
    found = [getattr(pipeline, name) for name in text.components[::-1] if getattr(pipeline, name, None) is not None]
    if len(found) == 1:
        return found[0], None
    return found, NoiseIntervals.from_sigmas([pipeline.config["boundary_ratio"]])


def _samples_and_conditions(
    batch: Columns, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clean samples (n, C, …), taken from the latents' distribution as in training, and the other columns."""
    columns = {name: column.to(device) for name, column in batch.items()}
    noise = torch.randn(batch["mean"][:, 0].shape, generator=generator).to(device)
    no_flips = torch.zeros(len(noise), dtype=torch.bool, device=device)
    x0 = clean_samples(columns, no_flips, noise)
    return x0, {name: column for name, column in columns.items() if name not in LATENT_COLUMNS}


def _schedule(scheduler: Any, patch_size: int, inputs: Sequence[tuple[torch.Tensor, Any]]) -> dict[str, float]:
    """What `set_timesteps` is given for the most frequent shape."""
    if not scheduler.config.get("use_dynamic_shifting"):
        return {}
    counts: Counter[torch.Size] = Counter()
    for latents, _ in inputs:
        counts[latents.shape[1:]] += len(latents)
    ((shape, _),) = counts.most_common(1)
    return {"mu": ResolutionShift.of_scheduler(scheduler, patch_size).mu(shape)}


def is_text_pipeline(name_or_path: str) -> bool:
    """
    Tell whether a saved pipeline is one of Diffusers' that are called with prompts, without loading it.

    Args:
        name_or_path (`str`): Its folder or Hub id.
    """
    if os.path.isdir(name_or_path) and not os.path.isfile(os.path.join(name_or_path, "model_index.json")):
        return False
    pipeline_class = saved_class(DiffusionPipeline.load_config(name_or_path))
    return pipeline_class is not None and PROMPT in inspect.signature(pipeline_class.__call__).parameters


def diagnose_encoded(
    name_or_path: str,
    encoded: Encoded,
    lora_experts: str | None = None,
    num_images: int = 256,
    num_bands: int = 8,
    num_inference_steps: int = 50,
    dtype: str = "float32",
) -> Diagnosis:
    """
    Load a text pipeline and diagnose its experts on images and captions that `encode_prompts.py` wrote.

    Args:
        name_or_path (`str`): The pipeline's folder or Hub id. Its denoisers and its scheduler alone are loaded.
        encoded ([`Encoded`]): Images and captions, encoded with this pipeline.
        lora_experts (`str`, *optional*): Folder or Hub id of LoRA experts; see [`diagnose_text_pipeline`].
        num_images (`int`): N, chosen at random.
        num_bands, num_inference_steps (`int`): See [`diagnose_text_pipeline`].
        dtype (`str`): Precision of the denoiser: float32, float16 or bfloat16.

    Raises:
        ValueError: if the images were encoded with another pipeline, a file is damaged, weights are not finite, or the device
            does not have the dtype; see also [`diagnose_text_pipeline`].
    """
    device = get_device()
    check_dtype(dtype_named(dtype), device)
    folder = name_or_path if os.path.isdir(name_or_path) else DiffusionPipeline.download(name_or_path)
    check_saved_folder(folder)
    text = text_pipeline_of(saved_class(DiffusionPipeline.load_config(folder)))
    wanted = {"scheduler", *text.components}
    pipeline = load_components(folder, wanted.__contains__, dtype=dtype_named(dtype))
    expect_finite_pipeline(pipeline, folder)
    check_encoding(encoded.encoding, pipeline, str(folder), encoded.source)
    check_shapes(encoded, pipeline)
    pipeline.to(device)
    batches, counts = _batches(encoded, num_images), (num_bands, num_inference_steps)
    if lora_experts is None:
        return diagnose_text_pipeline(pipeline, batches, None, *counts)
    diagnosis = diagnose_text_pipeline(pipeline, batches, LoraExperts.from_pretrained(lora_experts), *counts)
    summary = Path(lora_experts).parent / SUMMARY_NAME  # in a training's `output_dir`
    samples = training_samples_in(read_json(summary)) if summary.is_file() else None
    return dataclasses.replace(diagnosis, training_samples=samples)


def _batches(encoded: Encoded, num_images: int) -> list[Columns]:
    """Some samples, chosen at random, in batches of one size each."""
    chosen = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(SEED))[:num_images].numpy()
    samples, buckets = encoded.samples, encoded.buckets[chosen]
    rows = batches_of_one_bucket(range(len(chosen)), buckets, BATCH_SIZE)
    return [collate([samples[int(chosen[place])] for place in batch]) for batch in rows]
