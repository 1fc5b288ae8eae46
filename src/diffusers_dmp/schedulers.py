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


def make_like(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """
    Another scheduler for the same noise.

    Args:
        scheduler ([`SchedulerMixin`]): Whose configuration is taken over, but for `timestep_spacing`: many solvers cannot begin
            at the last timestep, where a cosine schedule leaves nothing of the image to be found; 'leading' begins before it.
        name (`str`): One of [`SCHEDULERS`].
    """
    return getattr(diffusers, SCHEDULERS[name]).from_config(scheduler.config, timestep_spacing="leading")
