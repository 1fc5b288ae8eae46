"""How fast training reads encoded images and captions: `python -m benchmarks.encoded_text [--num_images 4000]`.

Samples of 32 x 32 latents with 16 channels and of 77 text tokens, 768 wide, in batches of 64, read in random order from shards that
`encode_prompts` could have written.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import safetensors.torch
import torch
from accelerate import Accelerator

from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.arguments import LoopArguments
from diffusers_dmp.training.data.encoded_rows import CAPTION, FEATURES, HEIGHT, PROMPT, WIDTH, to_bytes
from diffusers_dmp.training.data.encoded_text import load_encoded_text
from diffusers_dmp.training.data.encoding_record import COMPONENTS, EMPTY_PROMPT_NAME, ENCODING_NAME
from diffusers_dmp.training.data.images import LATENTS

from .timing import hardware

DTYPES = ("bfloat16", "float32")
BATCH_SIZE, SHARD_SIZE = 64, 500
HEADER = "| what | samples/s | samples per second of a processor's time | GB/s |\n| --- | --- | --- | --- |"


def write_shards(folder: Path, num_images: int, dtype: torch.dtype) -> None:
    """Write shards of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def row() -> dict[str, object]:
        mean, std = (torch.randn(1, 16, 32, 32, generator=generator).to(dtype) for _ in range(2))
        prompt = {"prompt_embeds": torch.randn(77, 768, generator=generator).to(dtype)}
        latents = {"mean": mean, "std": std.abs()}
        return {LATENTS: to_bytes(latents), PROMPT: to_bytes(prompt), CAPTION: "a cat", HEIGHT: 256, WIDTH: 256}

    for start in range(0, num_images, SHARD_SIZE):
        rows = [row() for _ in range(min(SHARD_SIZE, num_images - start))]
        datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(folder / f"train-{start:08d}.parquet")
    encoding = {
        "num_images": num_images,
        COMPONENTS: {},
        "mirror": False,
        "dtype": str(dtype),
        "pipeline_class": "none",
    }
    (folder / ENCODING_NAME).write_text(json.dumps(encoding))
    safetensors.torch.save_file({"prompt_embeds": torch.zeros(1, 77, 768)}, folder / EMPTY_PROMPT_NAME)


def batches(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """A training's endless batches of the shards, read in this process."""
    args = LoopArguments(dataset=str(folder), batch_size=BATCH_SIZE, random_flip=False, report_to="none")
    accelerator = Accelerator(cpu=True)
    return load_encoded_text(accelerator, args).training_batches(accelerator, args, first_step=0)


def measure(folder: Path, num_batches: int) -> tuple[float, float, float]:
    """Read batches; return the samples in a second, in a second of processor time, and the bytes in a second."""
    endless = batches(folder)
    num_bytes = sum(column.nbytes for column in next(endless).values())
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(num_batches):
        next(endless)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    number = BATCH_SIZE * num_batches
    return number / wall, number / processor, num_bytes * num_batches / wall


def main(argv: list[str]) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--num_images", type=int, default=4000)
    parser.add_argument("--num_batches", type=int, default=200)
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    print(f"{hardware(torch.device('cpu'))}\n\n{HEADER}")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")  # the unpacked shards, too, are left nowhere
            shards = Path(folder, "shards")
            shards.mkdir()
            write_shards(shards, args.num_images, getattr(torch, dtype))
            samples, per_processor, bandwidth = measure(shards, args.num_batches)
        print(f"| {dtype} | {samples:,.0f} | {per_processor:,.0f} | {bandwidth / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    run_command(main, name="benchmarks.encoded_text")
