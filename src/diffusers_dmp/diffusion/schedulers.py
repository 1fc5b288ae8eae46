"""Diffusers' schedulers by the short names that the command line and the Space offer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
}
# these can begin at the last timestep, where a cosine schedule leaves nothing of the image (ᾱ ≈ 0)
_BEGIN_AT_PURE_NOISE = ("DDIMScheduler", "DDPMScheduler")


def scheduler_class(name: str) -> str:
    """
    The class of Diffusers that a name stands for.

    Args:
        name (`str`): A key of `SCHEDULERS` in any case, or the name of the class itself.

    Raises:
        ValueError: if it is none of them.
    """
    classes = {short.lower(): class_name for short, class_name in SCHEDULERS.items()}
    classes |= {class_name.lower(): class_name for class_name in SCHEDULERS.values()}
    if name.lower() not in classes:
        raise ValueError(f"Expected `scheduler` to be one of {', '.join(SCHEDULERS)}, but got {name!r}.")
    return classes[name.lower()]


def make_like(scheduler: "SchedulerMixin", class_name: str) -> "SchedulerMixin":
    """
    Make a scheduler of another class with the configuration of a given one.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler whose configuration is used. Solvers other than DDIM and DDPM get
            `timestep_spacing="leading"`, because they cannot begin at the last timestep of a cosine schedule.
        class_name (`str`): A class of Diffusers, one of the values of `SCHEDULERS`.
    """
    import diffusers  # here, so that the names above are listed at once

    settings = {} if class_name in _BEGIN_AT_PURE_NOISE else {"timestep_spacing": "leading"}
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
