"""Diffusers' schedulers by short names, for whoever lets people choose."""

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Euler": "EulerDiscreteScheduler",
}
_BEGIN_ANYWHERE = ("DDIMScheduler", "DDPMScheduler")


def make_like(scheduler: SchedulerMixin, class_name: str) -> SchedulerMixin:
    """
    Another scheduler for the same noise.

    Args:
        scheduler ([`SchedulerMixin`]): Whose configuration is taken over, but for the solvers' `timestep_spacing`: they cannot
            begin at the last timestep, where a cosine schedule leaves nothing of the image to be found; 'leading' begins before.
        class_name (`str`): One of [`SCHEDULERS`]' classes.
    """
    settings = {} if class_name in _BEGIN_ANYWHERE else {"timestep_spacing": "leading"}
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
