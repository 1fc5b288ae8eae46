"""A training's steps as the scripts do them (data, noise, averaged weights, log), compared with a bare loop of the same model."""

import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_dmp import DiTModel
from diffusers_dmp.training.arguments import TrainingArguments
from diffusers_dmp.training.compilation import compile_model
from diffusers_dmp.training.data.loop_data import Batch, LoopData
from diffusers_dmp.training.objectives.from_arguments import make_objective
from diffusers_dmp.training.precision import PRECISIONS, check_precision
from diffusers_dmp.training.preparation import prepare_run
from diffusers_dmp.training.recipe import TrainingRecipe
from diffusers_dmp.training.run import TrainingRun
from diffusers_dmp.training.utilisation import count_flops, measure_flops_per_second

from .timing import Ratio, Settings

TARGET = 1 / 0.95  # the script has 0.95 of the bare loop's images per second
SHAPE = (4, 32, 32)
NUM_CLASSES = 1000
PRECISION_OF = {dtype: name for name, dtype in PRECISIONS.items()}


class RandomLatents(LoopData):
    """One batch of latents with labels, again and again, in the CPU's memory as a data loader leaves it."""

    sample_shape = SHAPE

    def num_samples(self, args: Any) -> int:
        return args.batch_size

    def training_batches(self, accelerator: Accelerator, args: Any, first_step: int) -> Iterator[Batch]:
        moments = torch.randn(args.batch_size, 2, *SHAPE)
        batch = {"mean": moments, "std": moments.abs(), "class_labels": torch.arange(args.batch_size) % NUM_CLASSES}
        if accelerator.device.type == "cuda":
            batch = {name: column.pin_memory() for name, column in batch.items()}
        return itertools.repeat(batch)

    def num_validation_samples(self, args: Any) -> int:
        return 0

    def validation_batches(self, accelerator: Accelerator, args: Any) -> Iterator[tuple[list[int], Batch]]:
        return iter(())

    def identity(self, args: Any) -> dict[str, Any]:
        return {}

    def validation_identity(self, args: Any) -> dict[str, Any]:
        return {}

    def describe(self) -> str:
        return "random latents"

    def describe_validation(self) -> str:
        return "none"


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare the steps for each dtype, in mixed precision, and each batch size."""
    for dtype in settings.dtypes:
        check_precision(PRECISION_OF[dtype], settings.device)
    for dtype in settings.dtypes:
        for batch_size in settings.batch_sizes:
            AcceleratorState._reset_state(reset_partial_state=True)
            with tempfile.TemporaryDirectory() as folder:
                yield compare_loops(settings, dtype, batch_size, folder)


def compare_loops(settings: Settings, dtype: torch.dtype, batch_size: int, folder: str) -> Ratio:
    """Compare the steps of two copies of one model."""
    model = DiTModel.from_preset(
        settings.preset, num_classes=NUM_CLASSES, sample_size=SHAPE[-1], out_channels=SHAPE[0]
    )
    args = TrainingArguments(
        batch_size=batch_size,
        max_train_steps=10**9,
        mixed_precision=PRECISION_OF[dtype],
        compile=settings.compile,
        learn_sigma=False,
        report_to="none",
        output_dir=folder,
    )
    bare_model = copy.deepcopy(model).to(settings.device)
    # of one sample, as operations are counted eagerly: a whole batch takes more memory than the compiled step does
    flops = batch_size * count_flops(bare_step(bare_model, 1, dtype, compile=False))
    bare = bare_step(bare_model, batch_size, dtype, settings.compile)
    accelerator = Accelerator(cpu=settings.device.type == "cpu", mixed_precision=args.mixed_precision)
    objective = make_objective(args, model, in_latents=True)
    training = prepare_run(accelerator, args, model, objective, RandomLatents(), TrainingRecipe())
    script = script_step(training)
    ratio = settings.compare("", script, bare, TARGET)
    limit = measure_flops_per_second(accelerator.device, dtype)
    speeds = [
        f"{1e3 * batch_size / ms:,.1f} images/s, mfu {1e3 * flops / ms / limit:.1%}"
        for ms in (ratio.candidate_ms, ratio.baseline_ms)
    ]
    case = f"{settings.preset}, {settings.name_of(dtype)} batch {batch_size}"
    return replace(ratio, name=f"{case}: the training's loop ({speeds[0]}) / a bare loop ({speeds[1]})")


def script_step(training: TrainingRun) -> Callable[[], object]:
    """Make a function of the next step of a training."""
    steps = training.steps_from(0)

    def step() -> None:
        with redirect_stdout(sys.stderr):  # what the log says is no row of the table
            next(steps)

    return step


def bare_step(model: DiTModel, batch_size: int, dtype: torch.dtype, compile: bool) -> Callable[[], object]:
    """Make a function of one step on noisy latents that lie on the device, with nothing around it."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x_t, target = torch.randn(2, batch_size, *SHAPE, device=device)
    timesteps, labels = torch.randint(0, NUM_CLASSES, (2, batch_size), device=device)
    model.train()
    if compile:
        compile_model(model)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = model(x_t, timesteps, labels).sample
        F.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
