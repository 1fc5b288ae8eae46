"""Which optimisers and learning-rate schedules there are, what each takes, and what a user's choice of them must fulfil."""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import OptimisationArguments

WARMUP = "lr_warmup_steps"
# From a schedule of transformers' `get_scheduler` to the arguments that it takes; each maps to the name that the schedule's
# function has for it, the warm-up to the function's own argument.
SCHEDULES: dict[str, dict[str, str]] = {
    "constant": {},
    "constant_with_warmup": {WARMUP: ""},
    "linear": {WARMUP: ""},
    "cosine": {WARMUP: ""},
    "cosine_with_restarts": {WARMUP: "", "lr_num_cycles": "num_cycles"},
    "cosine_with_min_lr": {WARMUP: "", "min_lr_rate": "min_lr_rate"},
    "cosine_warmup_with_min_lr": {WARMUP: "", "min_lr_rate": "min_lr_rate"},
    "polynomial": {WARMUP: "", "lr_power": "power"},
    "inverse_sqrt": {WARMUP: ""},
    "warmup_stable_decay": {WARMUP: "", "lr_decay_steps": "num_decay_steps", "min_lr_rate": "min_lr_ratio"},
}
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # want a measurement at every step, which a training has not

# from an optimiser to the package that it needs, besides PyTorch
OPTIMISERS: dict[str, str | None] = {
    "adamw": None,
    "adamw_8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedule_free_adamw": "schedulefree",
}
MIN_PRODIGY_LEARNING_RATE = 0.1  # Prodigy's is a factor, about 1


def check_lr_schedule(args: "OptimisationArguments", defaults: dict[str, Any]) -> None:
    """
    Check the choice of a learning-rate schedule, and that it takes all arguments that are set.

    Args:
        args ([`OptimisationArguments`]): The arguments of a training.
        defaults (`dict[str, Any]`): The arguments' defaults, by name.

    Raises:
        ValueError: if there is no such schedule, or if an argument has no effect on it or no possible value.
    """
    valid = ", ".join(SCHEDULES)
    if args.lr_scheduler in METRIC_SCHEDULES:
        raise ValueError(
            f"Expected `lr_scheduler` to be one of {valid}, but got {args.lr_scheduler!r}, which follows a measurement "
            "instead of the number of steps."
        )
    if args.lr_scheduler not in SCHEDULES:
        raise ValueError(f"Expected `lr_scheduler` to be one of {valid}, but got {args.lr_scheduler!r}.")
    taken = set(SCHEDULES[args.lr_scheduler])
    if args.optimizer == "schedule_free_adamw":
        taken.add(WARMUP)  # has a warm-up of its own
    for name in {name for arguments in SCHEDULES.values() for name in arguments} - taken:
        if getattr(args, name) != defaults[name]:
            takers = ", ".join(schedule for schedule, arguments in SCHEDULES.items() if name in arguments)
            raise ValueError(
                f"Expected `{name}` to be {defaults[name]} for the `lr_scheduler` {args.lr_scheduler!r}, on which it has "
                f"no effect, but got {getattr(args, name)}; it has for {takers}."
            )
    if not 0 <= args.min_lr_rate <= 1:
        raise ValueError(f"Expected `min_lr_rate` to be in [0, 1], but got {args.min_lr_rate}.")
    if not 0 <= args.lr_warmup_steps <= args.max_train_steps:
        raise ValueError(
            f"Expected `lr_warmup_steps` to be in [0, {args.max_train_steps}], of the `max_train_steps`, but got "
            f"{args.lr_warmup_steps}."
        )
    if args.lr_scheduler == "warmup_stable_decay":
        most = args.max_train_steps - args.lr_warmup_steps
        if not 1 <= args.lr_decay_steps <= most:
            raise ValueError(
                f"Expected `lr_decay_steps` to be in [1, {most}], of the steps after the warm-up, but got "
                f"{args.lr_decay_steps}."
            )
    if args.lr_num_cycles < 1:
        raise ValueError(f"Expected `lr_num_cycles` to be at least 1, but got {args.lr_num_cycles}.")
    if args.lr_power <= 0:
        raise ValueError(f"Expected `lr_power` to be positive, but got {args.lr_power}.")


def check_optimiser(args: "OptimisationArguments") -> None:
    """
    Check the choice of an optimiser, that its package is installed, and that the other arguments fit it.

    Raises:
        ValueError: if there is no such optimiser, or if it cannot be used like this.
    """
    if args.optimizer not in OPTIMISERS:
        raise ValueError(f"Expected `optimizer` to be one of {', '.join(OPTIMISERS)}, but got {args.optimizer!r}.")
    package = OPTIMISERS[args.optimizer]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"Expected the package {package} to be installed for the `optimizer` {args.optimizer!r}, but it is not: "
            f"`pip install {package}`."
        )
    if args.optimizer == "prodigy" and args.learning_rate < MIN_PRODIGY_LEARNING_RATE:
        raise ValueError(
            "Expected `learning_rate` to be about 1 for the `optimizer` 'prodigy', which multiplies it with its own "
            f"estimate, but got {args.learning_rate}."
        )
    if args.optimizer != "schedule_free_adamw":
        return
    if args.lr_scheduler != "constant":
        raise ValueError(
            "Expected `lr_scheduler` to be 'constant' for the `optimizer` 'schedule_free_adamw', which needs no schedule, "
            f"but got {args.lr_scheduler!r}."
        )
    if args.ema_decay:
        raise ValueError(
            "Expected `ema_decay` to be 0 for the `optimizer` 'schedule_free_adamw', which averages the weights itself, "
            f"but got {args.ema_decay}."
        )
    if not 0 < args.adam_beta1 < 1:
        raise ValueError(
            "Expected `adam_beta1` to be in (0, 1) for the `optimizer` 'schedule_free_adamw', but got "
            f"{args.adam_beta1}."
        )
