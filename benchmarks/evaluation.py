"""Time and memory of an evaluation: `python -m benchmarks.evaluation fid|neighbours|sampling`.

Each part is a process of its own, because its peak memory is measured.
"""

import itertools
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffusers_dmp import ClassConditionalPipeline, DiTModel
from diffusers_dmp.evaluation.metrics import GaussianStatistics, frechet_distance, precision_and_recall
from diffusers_dmp.evaluation.npz import write_npz
from diffusers_dmp.evaluation.sample import SamplingArguments, sample_images
from diffusers_dmp.terminal import OneLineParser, run_command
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.objectives.from_arguments import make_scheduler

from .timing import HEADER, compare, hardware, seconds

FEATURES = 2048  # of an image, as Inception has them
CPU = torch.device("cpu")
SECONDS = 120.0  # for the comparison of samplings


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


def sampling() -> None:
    """Compare sampling through the evaluator with a script that loads the pipeline, samples, and writes the same file."""
    shape = {"num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 6, "sample_size": 8}
    shape |= {"in_channels": 1, "out_channels": 2}
    number, batch_size, num_inference_steps = 500, 100, 25
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(TrainingArguments(), in_latents=False)
        ClassConditionalPipeline(DiTModel(**shape, num_classes=10), scheduler).save_pretrained(folder)
        rounds = itertools.count()

        def bare_loop() -> None:
            pipeline = ClassConditionalPipeline.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            images = []
            for start in range(0, number, batch_size):
                indices = range(start, start + batch_size)
                generators = [torch.Generator().manual_seed(index) for index in indices]
                labels = [index % 10 for index in indices]
                images += pipeline(labels, num_inference_steps=num_inference_steps, generator=generators).images
            pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
            write_npz(Path(folder, "bare.npz"), [pixels], pixels.shape)

        def evaluator() -> None:
            output_dir = str(Path(folder, "sampled", str(next(rounds))))
            sample_images(
                SamplingArguments(
                    pipeline=folder,
                    output_dir=output_dir,
                    num_images=number,
                    batch_size=batch_size,
                    num_inference_steps=num_inference_steps,
                )
            )

        name = f"sampling {number} digits: evaluator / bare loop"
        print(f"\n{HEADER}")
        print(compare(name, evaluator, bare_loop, CPU, SECONDS, target=1.03).row())


def main(argv: list[str]) -> None:
    """Measure the part that the command line asks for."""
    parser = OneLineParser(description=__doc__)
    parts = {"fid": fid, "neighbours": neighbours, "sampling": sampling}
    parser.add_argument("part", choices=parts)
    part = parser.parse_args(argv).part
    print(hardware(CPU))
    parts[part]()


if __name__ == "__main__":
    run_command(main)
