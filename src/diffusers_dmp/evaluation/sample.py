"""Sample many images with a pipeline of classes, of text, or without conditions, for evaluation:

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
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from ..models.precision import check_dtype, check_tf32, dtype_named
from ..models.vision import network_sha256
from ..plugins.lora_experts import LoraExperts
from ..saving.finite import expect_finite_files
from ..saving.sources import check_source
from ..saving.weight_files import folder_sha256
from ..saving.whole import written_whole
from ..training.arguments import option
from ..training.data.encoded_images import EncodedImages
from ..training.data.folders import LABEL
from ..training.data.prompts import PROMPT, prompts_sha256, read_prompts
from ..training.data.random_numbers import noise_settings
from ..training.data.requests import CallArguments, Requests, make_requests
from ..training.data.seeded_sampling import (
    SeededSamplingArguments,
    compile_for_sampling,
    load_sampling_pipeline,
    sample_seeded,
)
from ..training.data.shards import make_shard_accelerator, remember_settings, write_shards
from ..training.parsing import renamed, run_entry_point
from .images import DatasetImages, read_ahead
from .npz import write_npz

NPZ_NAME, SETTINGS_NAME, PROMPTS_NAME = "samples.npz", "sampling.json", "prompts.json"
SHARDS, PNG_FOLDER = "shards", "png"


@renamed(num_samples="num_images")
@dataclass(kw_only=True)
class SamplingArguments(CallArguments, SeededSamplingArguments):
    """Arguments of [`sample_images`]."""

    output_dir: str = option("outputs/samples", f"Folder for {NPZ_NAME} and the shards that it is made of.")
    num_images: int = option(50_000, "How many images.")
    num_inference_steps: int = option(250, "Denoising steps.")
    guidance_channels: int | None = option(None, "How many channels are guided; all by default.")
    lora_experts: str | None = option(None, "Folder or Hub id of LoRA experts to attach to the pipeline.")
    tf32: bool = option(False, "Allow TF32 in float32 products, on a GPU that has it.")
    png: bool = option(False, f"Write {PNG_FOLDER}/<index>.png as well.")

    number_field: ClassVar[str] = "num_images"

    def __post_init__(self):
        super().__post_init__()
        self.check_call()
        check_source("lora_experts", self.lora_experts)


def sample_images(args: SamplingArguments) -> Path | None:
    """
    Write `samples.npz` in ADM's format: `arr_0` uint8 (N, H, W, 3), and if the pipeline has classes, `arr_1` with the labels.

    Image i has the class i modulo the number of classes, or the prompt i modulo the number of prompts, and its random numbers
    depend on the seed and on i alone. The images of an interrupted run are reused: the next run continues. Of a pipeline of
    videos, the first frame is the image. The prompts are written to `prompts.json`.

    Args:
        args ([`SamplingArguments`]): What to sample.

    Returns:
        The path of the file on the main process, None on the others.

    Raises:
        ValueError: if `output_dir` contains images that were sampled with other settings, the pipeline's call and the
            arguments do not fit, or the device does not have the dtype or TF32.
    """
    prompts = None if args.prompts is None else read_prompts(args.prompts, args.prompt_column)[: args.num_images]
    accelerator = make_shard_accelerator()
    check_dtype(dtype_named(args.dtype), accelerator.device)  # before anything is downloaded
    if args.tf32:
        check_tf32(accelerator.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    folder = Path(args.output_dir)
    with accelerator.main_process_first():
        source = args.pipeline if os.path.isdir(args.pipeline) else DiffusionPipeline.download(args.pipeline)
        experts = _experts_folder(args)
    pipeline = load_sampling_pipeline(str(source), args, accelerator.device)
    requests = _make_requests(pipeline, args, prompts)
    if experts is not None:
        LoraExperts.from_pretrained(experts).attach(pipeline)
    if args.compile and compile_for_sampling(pipeline):
        accelerator.print("Compiling: the first batch takes a minute or so longer.")
    with accelerator.main_process_first():
        settings = sampling_settings(args, pipeline, Path(source))
        if prompts is not None:
            settings |= {"num_prompts": len(prompts), "prompts_sha256": prompts_sha256(prompts)}
        if experts is not None:
            settings["lora_experts_sha256"] = folder_sha256(experts)
        remember_settings(folder / SETTINGS_NAME, settings, "images")
        if prompts is not None and not (folder / PROMPTS_NAME).exists():
            with written_whole(folder / PROMPTS_NAME) as unfinished:
                unfinished.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path = write_images(accelerator, pipeline, args, requests)
    accelerator.end_training()
    return path


def write_images(
    accelerator: Accelerator, pipeline: DiffusionPipeline, args: SamplingArguments, requests: Requests
) -> Path | None:
    """
    Sample the missing images of a folder, and write `samples.npz`.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        pipeline: As [`load_sampling_pipeline`] returned it, on the accelerator's device.
        args ([`SamplingArguments`]): What to sample.
        requests ([`Requests`]): What the pipeline is called with.

    Returns:
        The path of the file on the main process, None on the others.
    """
    folder = Path(args.output_dir)

    def make_shard(rows: range, progress: tqdm) -> datasets.Dataset:
        return _sample_shard(pipeline, args, rows, requests, progress)

    write_shards(accelerator, folder / SHARDS, args.num_images, args.shard_size, make_shard, "Sampling")
    accelerator.wait_for_everyone()
    return _join_shards(folder, args, requests) if accelerator.is_main_process else None


def _experts_folder(args: SamplingArguments) -> Path | None:
    """The local folder of the LoRA experts, whose weights are checked; None without any."""
    if args.lora_experts is None:
        return None
    folder = Path(args.lora_experts)
    if not folder.is_dir():
        folder = Path(snapshot_download(args.lora_experts, allow_patterns=["*.json", "*.safetensors"]))
    expect_finite_files(folder)
    return folder


def _make_requests(pipeline: DiffusionPipeline, args: SamplingArguments, prompts: list[str] | None) -> Requests:
    given = args.given("guidance_scale", "guidance_channels", "height", "width") | args.further_arguments()
    return make_requests(pipeline, prompts, given, num_inference_steps=args.num_inference_steps)


def _sample_shard(
    pipeline: DiffusionPipeline, args: SamplingArguments, rows: range, requests: Requests, progress: tqdm
) -> datasets.Dataset:
    """Sample the images with the indices `rows`, batch by batch."""
    features = {"image": datasets.Image()}
    with EncodedImages() as images:
        for start in range(0, len(rows), args.batch_size):
            indices = rows[start : start + args.batch_size]
            images.add(sample_seeded(pipeline, args.seed, indices, **requests(indices)))
            progress.update(len(indices))
        columns: dict[str, list] = {"image": images.encoded()}
    own = {PROMPT: ("string", requests.prompts_of(rows)), LABEL: ("int64", requests.labels_of(rows))}
    for name, (kind, values) in own.items():
        if values is not None:
            columns[name], features[name] = values, datasets.Value(kind)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _join_shards(folder: Path, args: SamplingArguments, requests: Requests) -> Path:
    """Write one `.npz` file from all shards, with one batch in memory at a time."""
    classes = requests.labels_of(range(args.num_images))
    labels = None if classes is None else np.array(classes)
    images = DatasetImages(str(folder / SHARDS))
    first = next(images.batches(1))
    path = folder / NPZ_NAME
    write_npz(path, read_ahead(images.batches(args.batch_size)), (len(images), *first.shape[1:]), labels)
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
        A dictionary that JSON can store. Batch size and compilation are not part of it: they change images by rounding only.
    """
    free = ("output_dir", "batch_size", "compile", "png", "prompt_column")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["prompts"] = None if args.prompts is None else Path(args.prompts).name
    settings["pipeline_arguments"] = args.further_arguments() or None
    settings["num_samples"] = settings.pop("num_images")  # its name in older folders and in fingerprints
    scheduler, vae = pipeline.scheduler, getattr(pipeline, "vae", None)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    settings["scheduler"] = f"{type(scheduler).__name__}, {config.get('timestep_spacing')}"
    settings["scheduler_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    settings["vae_sha256"] = None if vae is None else network_sha256(vae)
    settings["device"] = pipeline.device.type  # CPUs and GPUs have different random numbers
    settings |= noise_settings(pipeline.device)
    if args.guidance_scale is None:
        default = getattr(inspect.signature(pipeline.__call__).parameters.get("guidance_scale"), "default", None)
        # an `SNRSplitPipeline` has a scale for each denoiser in its config
        settings["guidance_scale"] = pipeline.config.get("guidance_scales") or default
    return settings | {"pipeline_sha256": folder_sha256(folder)}


if __name__ == "__main__":
    run_entry_point(SamplingArguments, sample_images)
