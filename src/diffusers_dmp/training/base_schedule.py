"""Whether a training continues what its base was trained for: the prediction type and the noise schedule are not in the weights.

A base of another kind is learned over at best, and at worst its frozen part stays wrong and the loss does not fall.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..diffusion.noise import are_same_levels, is_flow_matching
from ..saving.mixins import is_component
from ..saving.reading import read_json
from .arguments import TrainingArguments
from .objectives.from_arguments import make_scheduler
from .objectives.shifts import shift_of

SCHEDULER_FOLDER, VAE_FOLDER, MODEL_CONFIG = "scheduler", "vae", "config.json"
# of the original DiT (https://github.com/facebookresearch/DiT), whose files hold weights alone
PUBLISHED_SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

logger = logging.getLogger(__name__)


def check_base_schedule(
    args: TrainingArguments, base: nn.Module, name_or_path: str, vae: AutoencoderKL | None = None
) -> None:
    """
    Check that the arguments ask for the prediction type and the noise schedule that a base was trained with.

    They are those of the scheduler in the pipeline of the base, or beside its folder; for a file those of the published DiT.
    Where there is no scheduler to compare with, a warning says what is assumed.

    Args:
        args ([`TrainingArguments`]): For the noise schedule, the prediction type and the variance.
        base (`nn.Module`): The base; its configuration may have a `prediction_type` of its own.
        name_or_path (`str`): Where it was loaded from.
        vae ([`AutoencoderKL`], *optional*): The VAE of the training, which is compared with that in the base's pipeline.

    Raises:
        ValueError: if they differ; all differences are listed, and the arguments that match.
    """
    scheduler = base_scheduler(name_or_path)
    if scheduler is None:
        noise = "" if args.objective == "flow" else f"beta_schedule {args.beta_schedule}, "
        logger.warning(
            "No scheduler in or beside %r says how it was trained; it is assumed: prediction_type %s, %snum_train_timesteps %d.",
            name_or_path,
            args.prediction_type,
            noise,
            args.num_train_timesteps,
        )
        return
    differences = list(_differences(args, base, scheduler))
    advice = [_matching(args, base, scheduler)] if differences else []
    other_vae = [] if vae is None else list(_vae_differences(vae, name_or_path))
    if other_vae:
        advice.append("Give the base's own VAE as --vae")
    if advice:
        raise ValueError(
            f"Expected the training to continue as {name_or_path!r} was trained, but got "
            f"{'; '.join(differences + other_vae)}. {'. '.join(advice)}."
        )


def check_base_process(args: TrainingArguments, name_or_path: str) -> None:
    """
    Check, before a base is loaded, that the arguments ask for its noise process: its number of channels depends on it.

    Args:
        args ([`TrainingArguments`]): For the objective.
        name_or_path (`str`): Where the base is loaded from.

    Raises:
        ValueError: if they ask for the other one; the argument that matches is named.
    """
    scheduler = base_scheduler(name_or_path)
    if scheduler is not None and _process(scheduler) not in (args.objective, None):
        raise ValueError(
            f"Expected the training to continue as {name_or_path!r} was trained, but got "
            f"{_other_process(args, scheduler)}. Give --objective {_process(scheduler)}."
        )


def take_base_shift(args: TrainingArguments, name_or_path: str) -> None:
    """
    Set the shift of a flow-matching training, unless the arguments have one, to that of the base's pipeline.

    Args:
        args ([`TrainingArguments`]): Of which the `shift` is set.
        name_or_path (`str`): Where the base is loaded from.
    """
    scheduler = base_scheduler(name_or_path)
    if args.objective == "flow" and args.shift is None and scheduler is not None:
        args.shift = str(shift_of(scheduler))


def _process(scheduler: SchedulerMixin) -> str | None:
    """The objective of a scheduler's noise process; None if there is none."""
    if is_flow_matching(scheduler):
        return "flow"
    return "ddpm" if hasattr(scheduler, "alphas_cumprod") else None


def _other_process(args: TrainingArguments, scheduler: SchedulerMixin) -> str:
    return (
        f"a base with a {type(scheduler).__name__}, which adds noise in another way than `objective` {args.objective}"
    )


def base_scheduler(name_or_path: str) -> SchedulerMixin | None:
    """
    Load the scheduler that belongs to a model; None if there is none.

    Args:
        name_or_path (`str`): The folder or Hub id of a pipeline, the folder of a model in a pipeline's, or an original file.
    """
    if os.path.isfile(name_or_path):
        return DDPMScheduler(**PUBLISHED_SCHEDULE, variance_type="learned_range")
    pipeline = _pipeline_of(name_or_path)
    if isinstance(pipeline, Path):
        config = pipeline / SCHEDULER_FOLDER / SchedulerMixin.config_name
        class_name = read_json(config).get("_class_name") if config.is_file() else None
    else:
        try:
            entry = DiffusionPipeline.load_config(name_or_path).get(SCHEDULER_FOLDER)
        except OSError:  # no model_index.json: a model's repository
            entry = None
        class_name = entry[1] if is_component(entry) and entry else None
    scheduler_class: Any = getattr(diffusers, class_name or "", None)
    if scheduler_class is None:
        return None
    return scheduler_class.from_pretrained(pipeline, subfolder=SCHEDULER_FOLDER)


def _pipeline_of(name_or_path: str) -> "Path | str":
    """The folder or Hub id of the pipeline that a model belongs to; a model's folder lies in its pipeline's."""
    if not os.path.isdir(name_or_path):
        return name_or_path
    folder = Path(name_or_path).resolve()
    return folder.parent if (folder / MODEL_CONFIG).is_file() else folder


def _differences(args: TrainingArguments, base: nn.Module, scheduler: SchedulerMixin) -> Iterator[str]:
    """Say in words what differs."""
    if _process(scheduler) != args.objective:
        yield _other_process(args, scheduler)
        return
    for name, given, trained in (
        ("num_train_timesteps", args.num_train_timesteps, scheduler.config.num_train_timesteps),
        ("prediction_type", args.prediction_type, _prediction_type(base, scheduler)),
    ):
        if given != trained:
            yield f"`{name}` {given!r} for a base of {trained!r}"
    if args.objective == "flow":
        return
    own = make_scheduler(args, in_latents=False)
    variance_type = scheduler.config.get("variance_type")
    if args.learn_sigma and variance_type == "learned":
        yield "`learn_sigma` as learned_range for a base that predicts the variance itself"
    alphas, others = own.alphas_cumprod, scheduler.alphas_cumprod
    if len(alphas) == len(others) and not are_same_levels(alphas, others):
        t = len(alphas) // 2
        yield (
            f"`beta_schedule` {args.beta_schedule!r} for a base of {scheduler.config.get('beta_schedule')!r} (ᾱ at timestep {t} "
            f"is {alphas[t]:.3g}, not {others[t]:.3g})"
        )


def _vae_differences(vae: AutoencoderKL, name_or_path: str) -> Iterator[str]:
    """Say in words how the latents of a VAE differ from those that a base was trained on, if its pipeline has a VAE."""
    if os.path.isfile(name_or_path):  # an original file
        return
    try:
        trained = AutoencoderKL.load_config(_pipeline_of(name_or_path), subfolder=VAE_FOLDER)
    except OSError:  # a base without a VAE
        return
    for name, default in (("scaling_factor", 0.18215), ("shift_factor", None), ("latent_channels", 4)):
        given, of_base = vae.config.get(name, default), trained.get(name, default)
        if given != of_base:
            yield f"a `vae` with the `{name}` {given} for a base of {of_base}"


def _matching(args: TrainingArguments, base: nn.Module, scheduler: SchedulerMixin) -> str:
    """Say with which arguments the training would match."""
    wanted: dict[str, Any]
    process = _process(scheduler)
    if "flow" in (process, args.objective):
        wanted = {"objective": process, "num_train_timesteps": scheduler.config.get("num_train_timesteps")}
        changed = {name: value for name, value in wanted.items() if value is not None and getattr(args, name) != value}
        return _advice(changed)
    wanted = {"prediction_type": _prediction_type(base, scheduler)}
    for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
        wanted[name] = scheduler.config.get(name)
    changed = {name: value for name, value in wanted.items() if value is not None and getattr(args, name) != value}
    if wanted["beta_schedule"] == "squaredcos_cap_v2":  # which has no range of betas
        changed = {name: value for name, value in changed.items() if name not in ("beta_start", "beta_end")}
    try:
        own = DDPMScheduler(**{name: value for name, value in wanted.items() if name != "prediction_type"})
        reproduced = are_same_levels(own.alphas_cumprod, scheduler.alphas_cumprod)
    except (AttributeError, NotImplementedError, TypeError):
        reproduced = False
    return _advice(changed if reproduced else {})


def _advice(changed: dict[str, Any]) -> str:
    """Say which arguments to give, or that none match."""
    if not changed:
        return "No arguments match; convert the base, or train a new one"
    return "Give " + " ".join(f"--{name} {value}" for name, value in changed.items())


def _prediction_type(base: nn.Module, scheduler: SchedulerMixin) -> str:
    config: Any = base.config
    default = "flow_prediction" if is_flow_matching(scheduler) else "epsilon"
    return config.get("prediction_type") or scheduler.config.get("prediction_type") or default
