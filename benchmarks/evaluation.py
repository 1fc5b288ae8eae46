"""Time and memory of an evaluation: `python -m benchmarks.evaluation fid|neighbours|sampling [--preset DiT-XL/2] [--dtype bfloat16]`.

Each part is a process of its own, because its peak memory is measured.
"""

import argparse
import itertools
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.evaluation.metrics import GaussianStatistics, frechet_distance, precision_and_recall
from diffusers_dmp.evaluation.sample import SamplingArguments, write_images
from diffusers_dmp.models import DIT_PRESETS
from diffusers_dmp.models.precision import DTYPES, check_device, check_dtype, dtype_named
from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.data.requests import make_requests
from diffusers_dmp.training.data.seeded_sampling import compile_for_sampling, sample_seeded
from diffusers_dmp.training.data.shards import make_shard_accelerator

from .timing import HEADER, commit, compare, hardware, seconds

FEATURES = 2048  # of an image, as Inception has them
CPU = torch.device("cpu")
DIGITS = "digits"  # instead of a preset


def features(number: int, seed: int) -> torch.Tensor:
    """Make random features (number, FEATURES)."""
    return torch.randn(number, FEATURES, generator=torch.Generator().manual_seed(seed))


def report(name: str, call: Callable[[], object]) -> None:
    """Print the time and the peak memory of a call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    duration = seconds(call, CPU)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {name} | {duration:.1f} s | {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} before |", flush=True)


def fid() -> None:
    """Measure the Fréchet distance of 50,000 images."""
    generated, real = features(50_000, 0), features(50_000, 1)
    report(
        "FID, 50,000 against 50,000",
        lambda: frechet_distance(GaussianStatistics.of(generated), GaussianStatistics.of(real)),
    )


def neighbours() -> None:
    """Measure precision and recall, which compare all images with each other."""
    real = features(10_000, 1)
    for number in (10_000, 50_000):
        generated = features(number, 0)
        report(
            f"precision and recall, {number:,} against 10,000",
            lambda generated=generated: precision_and_recall(generated, real),
        )


def sampling(args: argparse.Namespace) -> None:
    """
    Compare sampling through the evaluator, which writes the images, with the pipeline alone, which has one generator for all.

    Both have the same pipeline, batches, scheduler and steps. DDPM takes random numbers in every step.
    """
    accelerator = make_shard_accelerator()
    device = accelerator.device
    if args.device is not None and check_device(args.device).type != device.type:
        raise ValueError(f"Expected `device` to be {device.type}, where evaluations compute, but got {args.device}.")
    check_dtype(dtype_named(args.dtype), device)
    pipeline = make_pipeline(args.preset).to(device)
    for network in (pipeline.transformer, pipeline.vae):
        if network is not None:
            network.to(dtype_named(args.dtype)).eval()
    pipeline.set_progress_bar_config(disable=True)
    steps, batch_size = args.num_inference_steps, args.batch_size
    requests = make_requests(pipeline, None, {}, num_inference_steps=steps)
    with RandomCalls() as calls:
        sample_seeded(pipeline, 0, range(batch_size), **requests(range(batch_size)))
    print(f"random calls for 1,000 images of {steps} steps: {calls.number * 1000 // batch_size:,}")
    if args.compile:
        compile_for_sampling(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        rounds = itertools.count()

        def bare_pipeline() -> None:
            generator = torch.Generator(device).manual_seed(0)
            for start in range(0, args.num_images, batch_size):
                pipeline(**requests(range(start, min(start + batch_size, args.num_images))), generator=generator)

        def evaluator() -> None:
            output_dir = str(Path(folder, str(next(rounds))))
            sizes = {"num_images": args.num_images, "batch_size": batch_size, "num_inference_steps": steps}
            chosen = SamplingArguments(pipeline="-", output_dir=output_dir, **sizes)
            write_images(accelerator, pipeline, chosen, requests)
            shutil.rmtree(output_dir)

        name = f"{args.num_images} images, {args.preset}, {args.dtype}: evaluator / bare pipeline"
        print(f"\n{HEADER}", flush=True)
        ratio = compare(name, evaluator, bare_pipeline, device, args.seconds, target=1 / 0.95)
        print(f"{ratio.row()}\n\nimages/s of the bare pipeline's: {1 / ratio.ratio:.3f}")


def make_pipeline(preset: str) -> ClassConditionalPipeline:
    """A pipeline with random weights: of digits of 8 x 8 pixels, or of a preset with a VAE, for images of 256 x 256."""
    if preset == DIGITS:
        shape = {
            "num_attention_heads": 6,
            "attention_head_dim": 16,
            "num_layers": 6,
            "sample_size": 8,
            "in_channels": 1,
        }
        return ClassConditionalPipeline(DiTModel(**shape, num_classes=10), DDPMScheduler())
    channels = (128, 256, 512, 512)  # Stable Diffusion's VAE
    down, up = (["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4)
    vae = AutoencoderKL(3, 3, down, up, channels, layers_per_block=2, latent_channels=4)
    return ClassConditionalPipeline(DiTModel.from_preset(preset), DDPMScheduler(), vae)


class RandomCalls(TorchDispatchMode):
    """Counts the calls that make normal random numbers."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += any(name in str(func) for name in ("randn", "normal_"))
        return func(*args, **kwargs or {})


def main(argv: list[str]) -> None:
    """Measure the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("part", choices=("fid", "neighbours", "sampling"))
    for_sampling = parser.add_argument_group("sampling")
    for_sampling.add_argument("--preset", default=DIGITS, choices=(DIGITS, *DIT_PRESETS))
    for_sampling.add_argument("--device", help="by default an accelerator, if there is one")
    for_sampling.add_argument("--dtype", default="float32", choices=DTYPES)
    for_sampling.add_argument("--compile", action="store_true")
    for_sampling.add_argument("--num_images", type=int, default=500)
    for_sampling.add_argument("--batch_size", type=int, default=100)
    for_sampling.add_argument("--num_inference_steps", type=int, default=50)
    for_sampling.add_argument("--seconds", type=float, default=120.0)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{hardware(device)}, commit {commit()}\n", flush=True)
    if args.part == "sampling":
        sampling(args)
    else:
        {"fid": fid, "neighbours": neighbours}[args.part]()


if __name__ == "__main__":
    run_command(main, name="benchmarks.evaluation")
