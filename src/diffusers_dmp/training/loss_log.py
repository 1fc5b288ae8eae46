"""What a training logs while it runs."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from ..intervals import NoiseIntervals
from .arguments import LoopArguments
from .compilation import CompiledSteps
from .loop import TrainingStep
from .metrics_file import METRICS_NAME, MetricsFile
from .model_flops import device_flops
from .progress import duration, progress_bar

ESTIMATE_STEPS = 10  # of a run, after which it is said how long the rest takes
NUM_LOSS_BANDS = 8  # the number of uniform intervals of timesteps for which the loss is logged separately


def trackable(args: LoopArguments) -> dict:
    """The arguments in the form that trackers accept: numbers and strings."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value)
        for name, value in vars(args).items()
    }


class LossLog:
    """
    Progress bar, trackers and `metrics.jsonl` of a training.

    After the first step and every n-th one it logs, over the steps since the last time: the loss, the loss in each of
    `NUM_LOSS_BANDS` uniform intervals of timesteps, the learning rate, images per second and `mfu`, model FLOPs utilisation: the
    share of the model's operations in what the device does in a large matrix product. Sums stay on the device until then. After
    ten steps it says how long the others will take. Steps that compile something count for neither speed.

    Args:
        accelerator (`Accelerator`): Of all processes, each of which has to call.
        args ([`LoopArguments`]): For the number n, the last step, the batch size and the output folder.
        num_train_timesteps (`int`): T.
        first_step (`int`): The number of steps done before.
    """

    def __init__(self, accelerator: Accelerator, args: LoopArguments, num_train_timesteps: int, first_step: int):
        self.accelerator = accelerator
        self.args = args
        self.first_step = first_step
        self.bands = NoiseIntervals.uniform(min(NUM_LOSS_BANDS, num_train_timesteps), num_train_timesteps)
        is_main = accelerator.is_main_process
        self.metrics = MetricsFile(Path(args.output_dir, METRICS_NAME), first_step) if is_main else None
        self.progress = progress_bar(args.max_train_steps, "Training", "step", first_step, disable=not is_main)
        self.seconds_paused = 0.0
        self.first_step_ended = 0.0
        self.device_flops = device_flops(accelerator.device, accelerator.mixed_precision)
        self.compiled_steps = CompiledSteps(self._training_time()) if args.compile else None
        if args.compile and is_main and first_step < args.max_train_steps:
            self.progress.write("Compiling: the first step takes a minute or so.")
        self._reset()

    def _reset(self) -> None:
        device = self.accelerator.device
        self.num_steps = self.num_timed_steps = 0
        self.flops: int | None = 0
        self.started = self._training_time()
        self.loss = torch.zeros((), device=device)
        self.band_losses = torch.zeros(self.bands.num_experts, device=device)
        self.band_counts = torch.zeros(self.bands.num_experts, device=device)

    def _training_time(self) -> float:
        """A clock in seconds that stands still while the log is paused."""
        return time.perf_counter() - self.seconds_paused

    @contextmanager
    def paused(self):
        """A context whose time does not count as training time."""
        start = time.perf_counter()
        yield
        self.seconds_paused += time.perf_counter() - start

    def is_due(self, step: int) -> bool:
        """Whether to log after a step."""
        return step == 1 or step % self.args.logging_steps == 0 or step == self.args.max_train_steps

    def __call__(self, done: TrainingStep, learning_rate: float, measured: dict[str, float] | None = None) -> None:
        """
        Add a step, and log if it is time.

        Args:
            done ([`TrainingStep`]): What the step did.
            learning_rate (`float`): The learning rate that it was done with.
            measured (`dict[str, float]`, *optional*): What was measured after this step, which is logged at once.
        """
        band = self.bands.index(done.timesteps)
        self.band_losses.index_add_(0, band, done.sample_losses)
        self.band_counts.index_add_(0, band, torch.ones_like(done.sample_losses))
        self.loss += done.loss
        self.num_steps += 1
        if not self._has_compiled(done.step):
            self.num_timed_steps += 1
            self.flops = None if self.flops is None or done.flops is None else self.flops + done.flops
        self.progress.update()
        values: dict[str, float] = {}
        if self.is_due(done.step):
            values = self._values(done, learning_rate)
            self._reset()
        values |= measured or {}
        if values:
            self.accelerator.log(values, step=done.step)
            if self.metrics is not None:
                self.metrics.add(done.step, values)
        self._estimate(done)

    def _values(self, done: TrainingStep, learning_rate: float) -> dict[str, float]:
        loss = self.accelerator.reduce(self.loss, "mean").item() / self.num_steps
        band_losses, band_counts = self.accelerator.reduce((self.band_losses, self.band_counts), "sum")
        values = {"loss": loss, "lr": learning_rate, **self._speed()}
        if done.grad_norm is not None:
            values["grad_norm"] = done.grad_norm.item()
        values |= {name: value.item() for name, value in done.auxiliary_losses.items()}
        edges = self.bands.edges
        for low, high, total, count in zip(edges, edges[1:], band_losses.tolist(), band_counts.tolist()):
            if count:
                values[f"loss_by_timestep/{low:04d}-{high - 1:04d}"] = total / count
        formats = {"loss": ".4f", "images_per_second": ".0f", "mfu": ".0%"}
        postfix = {name: format(values[name], spec) for name, spec in formats.items() if name in values}
        self.progress.set_postfix(postfix, refresh=done.step == 1)  # later with the bar's next update
        return values

    def _speed(self) -> dict[str, float]:
        """Images per second, and the utilisation of this process's device; nothing if every step compiled."""
        if not self.num_timed_steps:
            return {}
        seconds = self._training_time() - self.started
        speed = {"images_per_second": self.num_timed_steps * self.args.batch_size / seconds}
        if self.flops is not None and self.device_flops is not None:
            speed["mfu"] = self.flops / seconds / self.device_flops
        return speed

    def _has_compiled(self, step: int) -> bool:
        """Whether a step has compiled something, which is said; its time is taken out."""
        if self.compiled_steps is None:
            return False
        num_graphs, seconds = self.compiled_steps.end(self._training_time())
        if not num_graphs:
            return False
        self.started += seconds
        self.first_step_ended += seconds
        if self.accelerator.is_main_process:
            graphs = "1 graph" if num_graphs == 1 else f"{num_graphs} graphs"
            self.progress.write(f"Step {step} compiled {graphs}, and took {duration(seconds)}.")
        return True

    def _estimate(self, done: TrainingStep) -> None:
        """Say how long the rest of the training takes, from all steps but the first, which may compile and fill caches."""
        steps_here = done.step - self.first_step
        if steps_here not in (1, ESTIMATE_STEPS):
            return
        done.loss.item()  # a device may be behind
        if steps_here == 1:
            self.first_step_ended = self._training_time()
        elif self.accelerator.is_main_process and done.step < self.args.max_train_steps:
            per_step = (self._training_time() - self.first_step_ended) / (ESTIMATE_STEPS - 1)
            rest = duration(per_step * (self.args.max_train_steps - done.step))
            self.progress.write(f"After step {done.step} of {self.args.max_train_steps}: about {rest} to go.")

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
