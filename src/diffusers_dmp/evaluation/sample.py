"""Sample many images with a pipeline, for evaluation:

accelerate launch -m diffusers_dmp.evaluation.sample --pipeline outputs/demo/pipeline --num_images 50000 --output_dir outputs/demo/samples
"""

import hashlib
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..models.inputs import has_classes
from ..models.vision import network_sha256
from ..training.arguments import option
from ..training.data.seeded_sampling import SeededSamplingArguments, load_sampling_pipeline, sample_seeded
from ..training.data.shards import make_shard_accelerator, remember_settings, write_shards
from ..training.parsing import renamed, run_entry_point
from .images import DatasetImages
from .npz import write_npz

NPZ_NAME, SETTINGS_NAME = "samples.npz", "sampling.json"
SHARDS, PNG_FOLDER = "shards", "png"


@renamed(num_samples="num_images")
@dataclass(kw_only=True)
class SamplingArguments(SeededSamplingArguments):
    """Arguments of [`sample_images`]."""

    output_dir: str = option("outputs/samples", f"Folder for {NPZ_NAME} and the shards that it is made of.")
    num_images: int = option(50_000, "How many images.")
    num_inference_steps: int = option(250, "Denoising steps.")
    guidance_scale: float | None = option(None, "Scale of classifier-free guidance; by default the pipeline's own.")
    guidance_channels: int | None = option(None, "How many channels are guided; all by default.")
    tf32: bool = option(False, "Allow TF32 in float32 products, on a GPU that has it.")
    png: bool = option(False, f"Write {PNG_FOLDER}/<index>.png as well.")

    number_field: ClassVar[str] = "num_images"


def sample_images(args: SamplingArguments) -> Path | None:
    """
    Write `samples.npz` in ADM's format: `arr_0` uint8 (N, H, W, 3), and if the pipeline has classes, `arr_1` with the labels.

    Image i has the class i modulo the number of classes, and its random numbers depend on the seed and on i alone. The images of
    an interrupted run are reused: the next run continues.

    Args:
        args ([`SamplingArguments`]): What to sample.

    Returns:
        The path of the file on the main process, None on the others.

    Raises:
        ValueError: if `output_dir` contains images that were sampled with other settings.
    """
    accelerator = make_shard_accelerator()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    folder = Path(args.output_dir)
    with accelerator.main_process_first():
        source = args.pipeline if os.path.isdir(args.pipeline) else DiffusionPipeline.download(args.pipeline)
    pipeline = load_sampling_pipeline(str(source), args, accelerator.device)
    with accelerator.main_process_first():
        remember_settings(folder / SETTINGS_NAME, sampling_settings(args, pipeline, Path(source)), "images")
        (folder / SHARDS).mkdir(exist_ok=True)
    num_classes = getattr(pipeline, "num_classes", None)
    num_classes = num_classes if has_classes(num_classes) else None

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        return _sample_shard(pipeline, args, rows, num_classes, progress)

    write_shards(accelerator, folder / SHARDS, args.num_images, args.shard_size, make_shard, "Sampling")
    accelerator.wait_for_everyone()
    path = _join_shards(folder, args, num_classes) if accelerator.is_main_process else None
    accelerator.end_training()
    return path


def _labels(indices: range, num_classes: int) -> list[int]:
    """Return the classes of images: each class in turn."""
    return [index % num_classes for index in indices]


def _sample_shard(
    pipeline: DiffusionPipeline, args: SamplingArguments, rows: range, num_classes: int | None, progress: tqdm
) -> datasets.Dataset:
    """Sample the images with the indices `rows`, batch by batch."""
    arguments: dict[str, Any] = {"num_inference_steps": args.num_inference_steps}
    for name in ("guidance_scale", "guidance_channels"):
        if getattr(args, name) is not None:
            arguments[name] = getattr(args, name)
    columns: dict[str, list] = {"image": []}
    features = {"image": datasets.Image()}
    for start in range(0, len(rows), args.batch_size):
        indices = rows[start : start + args.batch_size]
        if num_classes is None:
            arguments["batch_size"] = len(indices)
        else:
            arguments["class_labels"] = _labels(indices, num_classes)
        columns["image"] += sample_seeded(pipeline, args.seed, indices, **arguments)
        progress.update(len(indices))
    if num_classes is not None:
        columns["label"], features["label"] = _labels(rows, num_classes), datasets.Value("int64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _join_shards(folder: Path, args: SamplingArguments, num_classes: int | None) -> Path:
    """Write one `.npz` file from all shards, with one batch in memory at a time."""
    labels = None if num_classes is None else np.array(_labels(range(args.num_images), num_classes))
    images = DatasetImages(str(folder / SHARDS))
    first = next(images.batches(1))
    path = folder / NPZ_NAME
    write_npz(path, images.batches(args.batch_size), (len(images), *first.shape[1:]), labels)
    if args.png:
        (folder / PNG_FOLDER).mkdir(exist_ok=True)
        for index, encoded in enumerate(images.dataset["image"]):
            (folder / PNG_FOLDER / f"{index:06d}.png").write_bytes(encoded["bytes"])
    return path


def sampling_settings(args: SamplingArguments, pipeline: DiffusionPipeline, folder: Path) -> dict[str, Any]:
    """
    Collect all settings that the images depend on. Where an argument is not given, it is replaced by the default's value.

    Args:
        args ([`SamplingArguments`]): The arguments.
        pipeline: As [`load_sampling_pipeline`] returned it.
        folder (`Path`): The folder that it was loaded from.

    Returns:
        A dictionary that JSON can store. The batch size is not part of it: it changes images by rounding only.
    """
    free = ("output_dir", "batch_size", "png")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["num_samples"] = settings.pop("num_images")  # its name in older folders and in fingerprints
    scheduler, vae = pipeline.scheduler, getattr(pipeline, "vae", None)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    settings["scheduler"] = f"{type(scheduler).__name__}, {config.get('timestep_spacing')}"
    settings["scheduler_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    settings["vae_sha256"] = None if vae is None else network_sha256(vae)
    settings["device"] = pipeline.device.type  # CPUs and GPUs have different random numbers
    if args.guidance_scale is None:
        default = getattr(inspect.signature(pipeline.__call__).parameters.get("guidance_scale"), "default", None)
        # an `SNRSplitPipeline` has a scale for each denoiser in its config
        settings["guidance_scale"] = pipeline.config.get("guidance_scales") or default
    return settings | {"pipeline_sha256": _folder_sha256(folder)}


def _folder_sha256(folder: Path) -> str:
    """Hash weights and configurations, to notice when another model is saved in the same folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    run_entry_point(SamplingArguments, sample_images)
