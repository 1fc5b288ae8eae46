"""Diffusers' schedulers by the short names that the command line and the Space offer."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduler_names import SCHEDULERS as SCHEDULERS

# these can begin at the last timestep, where a cosine schedule leaves nothing of the image (ᾱ ≈ 0)
_BEGIN_AT_PURE_NOISE = ("DDIMScheduler", "DDPMScheduler")


def make_like(scheduler: SchedulerMixin, class_name: str) -> SchedulerMixin:
    """
    Make a scheduler of another class with the configuration of a given one.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler whose configuration is used. Solvers other than DDIM and DDPM get
            `timestep_spacing="leading"`, because they cannot begin at the last timestep of a cosine schedule.
        class_name (`str`): A class of Diffusers, one of the values of `SCHEDULERS`.
    """
    settings = {} if class_name in _BEGIN_AT_PURE_NOISE else {"timestep_spacing": "leading"}
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
