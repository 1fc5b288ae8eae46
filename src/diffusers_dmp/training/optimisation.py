"""Optimiser, learning-rate schedule and averaged weights of a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import get_scheduler

from .arguments import OptimisationArguments
from .objectives.objective import Objective

HYPERPARAMETERS = ("lr", "initial_lr", "weight_decay", "betas")  # of a parameter group, which the arguments decide
MIN_LR_SCHEDULE = "cosine_with_min_lr"  # the only schedule that takes `min_lr_rate`


def make_optimizer(
    args: OptimisationArguments, model: nn.Module, objective: Objective, learning_rates: dict[str, float]
) -> torch.optim.Optimizer:
    """
    AdamW for the parameters of a model that need gradients, and for those that the objective learns.

    Args:
        args ([`OptimisationArguments`]): For learning rate, weight decay and betas.
        model (`nn.Module`): The model to train.
        objective ([`Objective`]): Its parameters have no weight decay, and the objective's own learning rate.
        learning_rates (`dict[str, float]`): The learning rates of parameters that have one of their own, by name.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_groups = [{"params": [parameters.pop(name)], "lr": lr} for name, lr in learning_rates.items()]
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}, *own_groups]
    if learns(objective):
        groups.append({"params": list(objective.parameters()), "lr": objective.learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )


def learns(objective: nn.Module) -> bool:
    """Whether an objective has parameters to learn, as the weighting `uw` has."""
    return any(parameter.requires_grad for parameter in objective.parameters())


def make_lr_scheduler(
    args: OptimisationArguments, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule that `args.lr_scheduler` names."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        scheduler_specific_kwargs={"min_lr_rate": args.min_lr_rate} if args.lr_scheduler == MIN_LR_SCHEDULE else {},
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
    for group, values in zip(optimizer.param_groups, wanted):
        group.update(values)
    lr_scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    # transformers' schedules are factors of the initial rates, by the number of steps done
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]  # type: ignore[attr-defined]
    for group, base_lr, factor in zip(optimizer.param_groups, lr_scheduler.base_lrs, factors):
        group["lr"] = base_lr * factor
    lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def make_ema(args: OptimisationArguments, model: nn.Module) -> EMAModel | None:
    """The average of the model's weights over the steps of a training; None if `args.ema_decay` is 0."""
    if not args.ema_decay:
        return None
    # Deviation from reference: Diffusers' EMAModel warms its decay up, so that short runs are averaged sensibly, too
    return EMAModel(model.parameters(), decay=args.ema_decay, foreach=True)


@contextmanager
def averaged_weights(model: nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """
    The model in eval mode and, if they are averaged, with its averaged weights; afterwards in training mode as it was.

    Args:
        model (`nn.Module`): The model, not wrapped.
        ema ([`EMAModel`], *optional*): The average.
    """
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        model.train()
        if ema is not None:
            ema.restore(model.parameters())
