"""Losses and weights that are not finite end a training before anything of them is saved."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator

from .arguments import LoopArguments
from .checkpoints import checkpoint_step, checkpoints
from .loop import TrainingStep
from .sharding import local


class FiniteCheck:
    """
    Remembers the first loss that is not finite, on the device, until it is read: no step waits for the device.

    Args:
        accelerator (`Accelerator`): Of all processes.
        args ([`LoopArguments`]): For what helps.
        num_train_timesteps (`int`): T, to say how noisy the samples of that loss were.
    """

    def __init__(self, accelerator: Accelerator, args: LoopArguments, num_train_timesteps: int):
        self.accelerator = accelerator
        self.args = args
        self.num_train_timesteps = num_train_timesteps
        self.learning_rates: dict[int, float] = {}  # of the steps since the last check
        self.names = ["loss"]  # of the losses of a batch: those added to the samples' loss, and the sum
        # step, timestep of the sample or -1, loss, and its index in `names`; step -1 as long as all losses are finite
        self.first = torch.tensor([-1.0, -1.0, 0.0, 0.0], device=accelerator.device)

    def add(self, done: TrainingStep, learning_rate: float) -> None:
        """Look at the losses of a step."""
        self.learning_rates[done.step] = learning_rate
        self.names = [*done.auxiliary_losses, "loss"]
        samples = done.sample_losses.isfinite()
        others = torch.stack([*done.auxiliary_losses.values(), done.loss]).float()
        first_sample = samples.logical_not().int().argmax()[None]  # index 0, if all are finite
        first_other = others.isfinite().logical_not().int().argmax()[None]
        values = [done.timesteps.index_select(0, first_sample), done.sample_losses.index_select(0, first_sample)]
        step, total = (torch.full_like(self.first[:1], value) for value in (done.step, len(self.names) - 1))
        of_sample = torch.cat([step, *(value.float() for value in values), total])
        of_batch = torch.cat(
            [step, torch.full_like(step, -1), others.index_select(0, first_other), first_other.float()]
        )
        is_new = (self.first[0] < 0) & ~(samples.all() & others.isfinite().all())
        self.first = torch.where(is_new, torch.where(samples.all(), of_batch, of_sample), self.first)

    def expect_finite_losses(self) -> None:
        """
        Check all losses since the last time; every process has to call.

        Raises:
            ValueError: if one was not finite: with its name, step, learning rate and precision, and a sample's noise level.
        """
        firsts = self.accelerator.gather(self.first[None]).tolist()  # (processes, 4)
        found = [first for first in firsts if first[0] >= 0]
        if found:
            step, timestep, loss, index = min(found)
            name = self.names[int(index)].replace("_", " ")
            noise_level = "" if timestep < 0 else f", at timestep {timestep:g} of {self.num_train_timesteps}"
            precision = self.accelerator.mixed_precision.replace("no", "float32")
            raise ValueError(
                f"Expected the {name} to be finite, but got {loss} in step {int(step)} (learning rate "
                f"{self.learning_rates[int(step)]:g}, {precision}{noise_level}); {self._advice(int(step))}"
            )
        self.learning_rates.clear()

    def expect_finite_weights(self, weights: Iterable[tuple[str, torch.Tensor]], step: int) -> None:
        """
        Check weights before they are saved; every process has to call, with its slices of those that are sharded.

        Args:
            weights (`Iterable`): Tensors and their names.
            step (`int`): The number of steps done.

        Raises:
            ValueError: if one has a value that is not finite.
        """
        names, tensors = zip(*weights)
        finite = torch.stack([local(tensor).isfinite().all() for tensor in tensors])
        finite = self.accelerator.gather(finite.to(self.accelerator.device, torch.uint8)[None]).amin(0)
        if not finite.all():
            first = names[finite.tolist().index(0)]
            raise ValueError(
                f"Expected the weights to be finite, but got others in {first!r} after step {step}; {self._advice(step)}"
            )

    def _advice(self, step: int) -> str:
        """From where to go on after what was met in a step, and what helps and is not done yet."""
        found = checkpoints(self.args.output_dir)
        saved = [path for path in found if checkpoint_step(path) < step]
        if saved:
            choice = "latest" if saved[-1] == found[-1] else saved[-1]
            way_on = f"`--resume_from_checkpoint {choice}` goes on from {saved[-1].name}"
        else:
            way_on = "there is no earlier checkpoint to go on from: begin again"
        remedies = ["a lower `--learning_rate`"]
        if self.args.max_grad_norm is None:
            remedies.append("`--max_grad_norm 1`")
        if self.accelerator.mixed_precision != "no":
            remedies.append("`--mixed_precision no`")
        return f"nothing was saved after that; {way_on}. What helps: {', or '.join(remedies)}."
