"""Optimiser, learning-rate schedule and averaged weights of a training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import get_scheduler

from .arguments import OptimisationArguments
from .objectives.objective import Objective
from .optimisers import SCHEDULES, WARMUP
from .sharding import local_parameters, reshard

# of a parameter group, which the arguments decide; the last two are schedule-free's and Prodigy's
HYPERPARAMETERS = ("lr", "initial_lr", "weight_decay", "betas", "warmup_steps", "safeguard_warmup")


def make_optimizer(
    args: OptimisationArguments, model: nn.Module, objective: Objective, learning_rates: dict[str, float]
) -> torch.optim.Optimizer:
    """
    The optimiser that `args.optimizer` names, of a model's parameters that need gradients and of those that the objective
    learns.

    Args:
        args ([`OptimisationArguments`]): For the optimiser, learning rate, weight decay and betas.
        model (`nn.Module`): The model to train.
        objective ([`Objective`]): Its parameters have no weight decay, and the objective's own learning rate.
        learning_rates (`dict[str, float]`): The learning rates of parameters that have one of their own, by name.

    Raises:
        ValueError: if there are several learning rates, and the optimiser takes only one.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_groups = [{"params": [parameters.pop(name)], "lr": lr} for name, lr in learning_rates.items()]
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}, *own_groups]
    if learns(objective):
        groups.append({"params": list(objective.parameters()), "lr": objective.learning_rate, "weight_decay": 0.0})
    shared: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.weight_decay,
    }
    if args.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if len(groups) > 1:
            rates = sorted({group.get("lr", args.learning_rate) for group in groups})
            raise ValueError(
                "Expected another `optimizer` than 'prodigy', which takes one learning rate for all parameters, where "
                f"some have their own: {', '.join(map(str, rates))}."
            )
        return Prodigy(groups, **shared, safeguard_warmup=args.lr_warmup_steps > 0)
    if args.optimizer == "schedule_free_adamw":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(groups, **shared, warmup_steps=args.lr_warmup_steps)
    return torch.optim.AdamW(groups, **shared, fused=True)


def learns(objective: nn.Module) -> bool:
    """Whether an objective has parameters to learn, as the weighting `uw` has."""
    return any(parameter.requires_grad for parameter in objective.parameters())


def make_lr_scheduler(
    args: OptimisationArguments, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule that `args.lr_scheduler` names."""
    own = {name: getattr(args, field) for field, name in SCHEDULES[args.lr_scheduler].items() if field != WARMUP}
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        scheduler_specific_kwargs=own,
    )


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the arguments decide of each parameter group."""
    return [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups]


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LRScheduler, wanted: list[dict[str, Any]]
) -> None:
    """
    Let the arguments decide again, after a checkpoint was loaded, which restores its own values.

    Args:
        optimizer, lr_scheduler: As they were loaded.
        wanted (`list[dict]`): As [`hyperparameters`] returned it before that.
    """
    # schedule-free trains weights that lie between its average and z, as β1 says: found with the old β1, left with the new
    moves = any(
        "train_mode" in group and group["betas"][0] != values["betas"][0]
        for group, values in zip(optimizer.param_groups, wanted)
    )
    if moves:
        optimizer.eval()  # type: ignore[attr-defined]
    for group, values in zip(optimizer.param_groups, wanted):
        group.update(values)
    if moves:
        optimizer.train()  # type: ignore[attr-defined]
    lr_scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    # transformers' schedules are factors of the initial rates, by the number of steps done
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]  # type: ignore[attr-defined]
    for group, base_lr, factor in zip(optimizer.param_groups, lr_scheduler.base_lrs, factors):
        group["lr"] = base_lr * factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def current_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of a model's weights: the schedule's, times Prodigy's estimate or in schedule-free's warm-up."""
    group = optimizer.param_groups[0]
    return float(group.get("scheduled_lr", group["lr"] * group.get("d", 1.0)))


class ScheduleFreeAverage:
    """
    The average of the weights that a schedule-free optimiser makes itself, in the place of an [`EMAModel`].

    The optimiser's own way from the average back to the weights that it trains is exact up to rounding only. Here they are
    restored exactly, so that a training does not depend on how often it is looked at.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimiser, not wrapped; it is set to training mode.
        model (`nn.Module`): The model, not wrapped.
    """

    def __init__(self, optimizer: Any, model: nn.Module):
        self.optimizer = optimizer
        self.model = model
        self._stored: list[torch.Tensor] = []
        optimizer.train()

    def _trained(self) -> list[torch.Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do nothing: the optimiser has averaged."""

    def to(self, device: torch.device) -> None:
        """Do nothing: the average lies where the optimiser's state does."""

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the weights that are trained."""
        self._stored = [parameter.detach().to("cpu", copy=True) for parameter in self._trained()]

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the model the average."""
        self.optimizer.eval()

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give the model the weights that are trained."""
        self.optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(self._trained(), self._stored):
                parameter.copy_(value)
        self._stored = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """The average of each of the model's parameters."""
        with averaged_weights(self.model, self):
            return [parameter.detach().clone() for parameter in self.model.parameters()]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, for those who take the averaged weights out of it."""
        return {"shadow_params": self.shadow_params}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the optimiser's state has it."""


def make_ema(
    args: OptimisationArguments, model: nn.Module, optimizer: torch.optim.Optimizer
) -> EMAModel | ScheduleFreeAverage | None:
    """The average of the model's weights over the steps of a training; None without one."""
    if args.optimizer == "schedule_free_adamw":
        return ScheduleFreeAverage(getattr(optimizer, "optimizer", optimizer), model)
    if not args.ema_decay:
        return None
    # Deviation from reference: Diffusers' EMAModel warms its decay up, so that short runs are averaged sensibly, too
    return EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | ScheduleFreeAverage | None) -> Iterator[None]:
    """
    The model in eval mode and, if they are averaged, with its averaged weights; afterwards in training mode as it was.

    Args:
        model (`nn.Module`): The model, not wrapped.
        ema ([`EMAModel`] or [`ScheduleFreeAverage`], *optional*): The average.
    """
    if ema is not None:
        ema.store(local_parameters(model))
        ema.copy_to(local_parameters(model))
    model.eval()
    try:
        yield
    finally:
        model.train()
        reshard(model)
        if ema is not None:
            ema.restore(local_parameters(model))
