"""Many images of a pipeline, as evaluations want them:

accelerate launch -m diffusers_dmp.evaluation.sample --pipeline outputs/demo/pipeline --num_samples 50000 --output_dir outputs/demo/samples
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

from ..models.vision import network_sha256
from ..training.arguments import option, parse_arguments
from ..training.data.seeded_sampling import SeededSamplingArguments, load_sampling_pipeline, sample_seeded
from ..training.data.shards import make_shard_accelerator, remember_settings, write_shards
from .images import DatasetImages
from .npz import write_npz

NPZ_NAME, SETTINGS_NAME = "samples.npz", "sampling.json"
SHARDS, PNG_FOLDER = "shards", "png"


@dataclass(kw_only=True)
class SamplingArguments(SeededSamplingArguments):
    output_dir: str = option("outputs/samples", f"Where {NPZ_NAME} is written, and what it is put together of.")
    num_samples: int = option(50_000, "How many.")
    num_inference_steps: int = option(250, "Denoising steps.")
    guidance_scale: float | None = option(None, "Of classifier-free guidance; the pipeline's own by default.")
    guidance_channels: int | None = option(None, "How many channels it guides; all by default.")
    tf32: bool = option(False, "Let float32 products be computed in TF32, on a GPU that has it.")
    png: bool = option(False, f"Write {PNG_FOLDER}/<index>.png as well.")

    number_field: ClassVar[str] = "num_samples"


def sample_images(args: SamplingArguments) -> Path | None:
    """
    Write `samples.npz` as ADM has it: `arr_0` uint8 (N, H, W, 3), and for a pipeline of classes `arr_1`, each image's, in turn.

    An image is decided by seed and index alone. What a killed run has finished is kept, and the next one goes on.

    Returns:
        The file, on the main process.

    Raises:
        ValueError: if `output_dir` holds images that were drawn otherwise.
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
    num_classes = None if num_classes == 1 else num_classes  # a DiT trained without labels
    arguments = {"num_inference_steps": args.num_inference_steps}
    for name in ("guidance_scale", "guidance_channels"):
        if getattr(args, name) is not None:
            arguments[name] = getattr(args, name)

    def label(index: int) -> int:
        return index % num_classes

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        columns, features = {"image": []}, {"image": datasets.Image()}
        for start in range(0, len(rows), args.batch_size):
            indices = rows[start : start + args.batch_size]
            own = {"batch_size": len(indices)} if num_classes is None else {"class_labels": [*map(label, indices)]}
            columns["image"] += sample_seeded(pipeline, args.seed, indices, **arguments, **own)
            progress.update(len(indices))
        if num_classes is not None:
            columns["label"], features["label"] = [*map(label, rows)], datasets.Value("int64")
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    write_shards(accelerator, folder / SHARDS, args.num_samples, args.shard_size, make_shard, "Sampling")
    accelerator.wait_for_everyone()
    path = None
    if accelerator.is_main_process:
        labels = None if num_classes is None else np.array([*map(label, range(args.num_samples))])
        path = _put_together(folder, args, labels)
    accelerator.end_training()
    return path


def _put_together(folder: Path, args: SamplingArguments, labels: np.ndarray | None) -> Path:
    """One batch in memory at a time."""
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
    What decides the images, and so not how many are drawn at a time; defaults by what they come to.

    Args:
        args ([`SamplingArguments`]): What was asked for.
        pipeline: As [`load_sampling_pipeline`] returned it.
        folder (`Path`): What it was loaded from.
    """
    free = ("output_dir", "batch_size", "png")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    scheduler, vae = pipeline.scheduler, getattr(pipeline, "vae", None)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    settings["scheduler"] = f"{type(scheduler).__name__}, {config.get('timestep_spacing')}"
    settings["scheduler_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    settings["vae_sha256"] = None if vae is None else network_sha256(vae)
    settings["device"] = pipeline.device.type  # whose random numbers they are
    if args.guidance_scale is None:
        default = getattr(inspect.signature(pipeline.__call__).parameters.get("guidance_scale"), "default", None)
        settings["guidance_scale"] = (
            pipeline.config.get("guidance_scales") or default
        )  # an `SNRSplitPipeline`'s are its own
    return settings | {"pipeline_sha256": _sha256(folder)}


def _sha256(folder: Path) -> str:
    """Of weights and configurations: another model may have come to lie in the same place."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


if __name__ == "__main__":
    sample_images(parse_arguments(SamplingArguments))
