"""How fast a training reads its data: `python -m benchmarks.data [--workers 0 1 2] [--kinds latents_float32 pngs]`.

Latents of 4 x 32 x 32 and their mirror images, text of 77 tokens with latents of 16 x 32 x 32, and PNGs of 512 pixels that become 256, in
random order and batches of 128. A worker's own processor time bounds what several of them do: read the table at as many workers
as there are free cores.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import safetensors.torch
import torch
from accelerate import Accelerator

from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.arguments import LoopArguments, SharedTrainingArguments
from diffusers_dmp.training.data.batches import training_batches
from diffusers_dmp.training.data.encoded_text import load_encoded_text
from diffusers_dmp.training.data.images import LATENTS, load_images

from . import encoded_text
from .timing import commit, hardware

BATCH_SIZE, SHARD_SIZE = 128, 4096
HEADER = "| what | workers | images/s |\n| --- | --- | --- |"
Batches = Iterator[dict[str, torch.Tensor]]


def write_latents(folder: Path, num_images: int, dtype: torch.dtype) -> None:
    """Write shards as `encode_latents` does."""
    generator = torch.Generator().manual_seed(0)
    features = datasets.Features({LATENTS: datasets.Value("binary"), "label": datasets.Value("int64")})
    for start in range(0, num_images, SHARD_SIZE):
        moments = torch.randn(min(SHARD_SIZE, num_images - start), 2, 2, 4, 32, 32, generator=generator).to(dtype)
        rows = [safetensors.torch.save({"mean": mean.clone(), "std": std.clone()}) for mean, std in moments]
        shard = {LATENTS: rows, "label": [index % 10 for index in range(len(rows))]}
        datasets.Dataset.from_dict(shard, features).to_parquet(folder / f"train-{start:08d}.parquet")


def write_pngs(folder: Path, num_images: int) -> None:
    """Write a folder of images that compress about as photos do."""
    generator = np.random.default_rng(0)
    for index in range(num_images):
        coarse = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        smooth = np.asarray(PIL.Image.fromarray(coarse).resize((512, 512), PIL.Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + generator.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)
        label = folder / str(index % 10)
        label.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(label / f"{index}.png")


def read_images(folder: Path, num_workers: int) -> Batches:
    """A training's endless batches of images, or of their latents."""
    args = SharedTrainingArguments(
        dataset=str(folder), batch_size=BATCH_SIZE, dataloader_num_workers=num_workers, report_to="none"
    )
    return training_batches(Accelerator(cpu=True), args, load_images(str(folder)), first_step=0)


def read_text(folder: Path, num_workers: int) -> Batches:
    """A training's endless batches of encoded images and captions."""
    args = LoopArguments(
        dataset=str(folder),
        batch_size=BATCH_SIZE,
        dataloader_num_workers=num_workers,
        random_flip=False,
        report_to="none",
    )
    accelerator = Accelerator(cpu=True)
    return load_encoded_text(accelerator, args).training_batches(accelerator, args, first_step=0)


def images_per_second(batches: Batches, seconds: float) -> float:
    """Read for some seconds, after a few batches that workers have read ahead."""
    for _ in range(8):
        next(batches)
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        number += len(next(iter(next(batches).values())))
    return number / (time.perf_counter() - start)


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path, int], Batches], int]] = {
    "latents_float32": (lambda folder, number: write_latents(folder, number, torch.float32), read_images, 8192),
    "latents_float16": (lambda folder, number: write_latents(folder, number, torch.float16), read_images, 8192),
    "text_bfloat16": (
        lambda folder, number: encoded_text.write_shards(folder, number, torch.bfloat16),
        read_text,
        2048,
    ),
    "pngs": (write_pngs, read_images, 512),
}


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="per number of workers")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    print(f"{hardware(torch.device('cpu'))}, commit {commit()}\n\n{HEADER}", flush=True)
    for kind in args.kinds:
        write, read, num_images = KINDS[kind]
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")  # the unpacked shards, too, are left nowhere
            data = Path(folder, "data")
            data.mkdir()
            write(data, num_images)
            for num_workers in args.workers:
                speed = images_per_second(read(data, num_workers), args.seconds)
                print(f"| {kind} | {num_workers} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    run_command(main, name="benchmarks.data")
