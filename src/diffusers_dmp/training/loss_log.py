"""What a training reports while it runs."""

import json
import logging
import math
import time

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..intervals import NoiseIntervals
from .arguments import TrainingArguments
from .loop import TrainingStep

NUM_LOSS_BANDS = 8  # the loss is logged apart for this many uniform stretches of noise

logger = logging.getLogger(__name__)


def trackable(args: TrainingArguments) -> dict:
    """The arguments as the trackers take them."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in vars(args).items()
    }


class LossLog:
    """
    Progress bar and trackers: the loss, the loss in each of `NUM_LOSS_BANDS` uniform stretches of noise, the learning
    rate, and images per second, over the steps since the last time. Sums stay on the device until they are due.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments, first_step: int):
        self.accelerator = accelerator
        self.args = args
        self.bands = NoiseIntervals.uniform(min(NUM_LOSS_BANDS, args.num_train_timesteps), args.num_train_timesteps)
        self.progress = tqdm(
            total=args.max_train_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        self._reset()

    def _reset(self) -> None:
        self.num_steps = 0
        self.started = time.perf_counter()
        # sum of losses and number of samples of each band, and the sum of the batches' losses
        self.sums = torch.zeros(2 * self.bands.num_experts + 1, device=self.accelerator.device)

    def __call__(self, done: TrainingStep, learning_rate: float) -> None:
        num_bands = self.bands.num_experts
        band = self.bands.index(done.timesteps)
        self.sums.index_add_(0, band, done.sample_losses)
        self.sums.index_add_(0, band + num_bands, torch.ones_like(done.sample_losses))
        self.sums[-1] += done.loss
        self.num_steps += 1
        self.progress.update()
        if done.step % self.args.logging_steps == 0 or done.step == self.args.max_train_steps:
            self._write(done, learning_rate)
            self._reset()

    def _write(self, done: TrainingStep, learning_rate: float) -> None:
        sums = self.accelerator.reduce(self.sums, "sum").tolist()
        num_bands = self.bands.num_experts
        values = {
            "loss": sums[-1] / (self.num_steps * self.accelerator.num_processes),
            "lr": learning_rate,
            "images_per_second": self.num_steps * self.args.batch_size / (time.perf_counter() - self.started),
        }
        if done.grad_norm is not None:
            values["grad_norm"] = done.grad_norm.item()
        for band, (total, count) in enumerate(zip(sums[:num_bands], sums[num_bands:-1])):
            if count:
                low, high = self.bands.edges[band], self.bands.edges[band + 1]
                values[f"loss_by_timestep/{low:04d}-{high - 1:04d}"] = total / count
        if not math.isfinite(values["loss"]):
            logger.warning("The loss is %s at step %d.", values["loss"], done.step)
        self.progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.0f}")
        self.accelerator.log(values, step=done.step)

    def close(self) -> None:
        self.progress.close()
