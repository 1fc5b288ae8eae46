"""Diffusers' schedulers by the short names that the command line and the Space offer."""

from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduler_names import SCHEDULERS as SCHEDULERS


def make_like(scheduler: SchedulerMixin, class_name: str, **settings: Any) -> SchedulerMixin:
    """
    Make a scheduler of another class with the configuration of a given one.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler whose configuration is used.
        class_name (`str`): A class of Diffusers, one of the values of `SCHEDULERS`.
        settings: Settings to use instead of those of the configuration.
    """
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
