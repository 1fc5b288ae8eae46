"""What a training logs while it runs."""

import json
import time
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..intervals import NoiseIntervals
from .arguments import SharedTrainingArguments
from .loop import TrainingStep

NUM_LOSS_BANDS = 8  # the number of uniform intervals of timesteps for which the loss is logged separately


def trackable(args: SharedTrainingArguments) -> dict:
    """The arguments in the form that trackers accept: numbers and strings."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in vars(args).items()
    }


class LossLog:
    """
    Progress bar and trackers of a training.

    Every n-th step it logs, over the steps since the last time: the loss, the loss in each of `NUM_LOSS_BANDS` uniform
    intervals of timesteps, the learning rate and images per second. Sums stay on the device until then.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`SharedTrainingArguments`]): For the number n, the last step and the batch size.
        first_step (`int`): The number of steps done before.
    """

    def __init__(self, accelerator: Accelerator, args: SharedTrainingArguments, first_step: int):
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
        device = self.accelerator.device
        self.num_steps = 0
        self.seconds_paused = 0.0
        self.started = time.perf_counter()
        self.loss = torch.zeros((), device=device)
        self.band_losses = torch.zeros(self.bands.num_experts, device=device)
        self.band_counts = torch.zeros(self.bands.num_experts, device=device)

    @contextmanager
    def paused(self):
        """A context whose time does not count as training time."""
        start = time.perf_counter()
        yield
        self.seconds_paused += time.perf_counter() - start

    def __call__(self, done: TrainingStep, learning_rate: float) -> None:
        """Add a step, and log if it is time."""
        band = self.bands.index(done.timesteps)
        self.band_losses.index_add_(0, band, done.sample_losses)
        self.band_counts.index_add_(0, band, torch.ones_like(done.sample_losses))
        self.loss += done.loss
        self.num_steps += 1
        self.progress.update()
        if done.step % self.args.logging_steps == 0 or done.step == self.args.max_train_steps:
            self._write(done, learning_rate)
            self._reset()

    def _write(self, done: TrainingStep, learning_rate: float) -> None:
        loss = self.accelerator.reduce(self.loss, "mean").item() / self.num_steps
        band_losses, band_counts = self.accelerator.reduce((self.band_losses, self.band_counts), "sum")
        seconds = time.perf_counter() - self.started - self.seconds_paused
        values = {
            "loss": loss,
            "lr": learning_rate,
            "images_per_second": self.num_steps * self.args.batch_size / seconds,
        }
        if done.grad_norm is not None:
            values["grad_norm"] = done.grad_norm.item()
        values |= {name: value.item() for name, value in done.auxiliary_losses.items()}
        edges = self.bands.edges
        for low, high, total, count in zip(edges, edges[1:], band_losses.tolist(), band_counts.tolist()):
            if count:
                values[f"loss_by_timestep/{low:04d}-{high - 1:04d}"] = total / count
        self.progress.set_postfix(loss=f"{loss:.4f}", images_per_second=f"{values['images_per_second']:.0f}")
        self.accelerator.log(values, step=done.step)

    def close(self) -> None:
        """End the progress bar."""
        self.progress.close()


class ExpertCounts:
    """
    The number of samples that each expert was trained on, by all processes; checkpoints carry it on.

    Args:
        intervals ([`NoiseIntervals`]): The intervals of all experts.
    """

    def __init__(self, intervals: NoiseIntervals):
        self.samples = [0] * intervals.num_experts

    def add(self, owners: list[int], batch_size: int) -> None:
        """Count a batch of which each process trained one expert; see [`StepExperts`]."""
        for expert in owners:
            self.samples[expert] += batch_size // len(owners)

    def state_dict(self) -> dict[str, list[int]]:
        """What a checkpoint holds."""
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Go on counting from a checkpoint."""
        self.samples = state["samples"]
