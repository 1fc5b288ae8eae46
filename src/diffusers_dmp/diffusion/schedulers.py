"""Diffusers' schedulers by the short names that the command line and the Space offer."""

import inspect
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import is_flow_matching
from .scheduler_names import SCHEDULERS as SCHEDULERS

_OF_FLOW_MATCHING = {"EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler"}  # the same solver, in another class


def make_like(scheduler: SchedulerMixin, class_name: str, **settings: Any) -> SchedulerMixin:
    """
    Make a scheduler of another class with the configuration of a given one.

    A flow-matching scheduler becomes another one with the same shift, where there is one of that solver.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler whose configuration is used.
        class_name (`str`): A class of Diffusers, one of the values of `SCHEDULERS`.
        settings: Settings to use instead of those of the configuration.
    """
    if is_flow_matching(scheduler):
        class_name = _OF_FLOW_MATCHING.get(class_name, class_name)
        shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift") or 1.0
        names = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift, "shift": shift}
        takes = inspect.signature(getattr(diffusers, class_name).__init__).parameters
        if "use_flow_sigmas" in takes or class_name in _OF_FLOW_MATCHING.values():
            settings = {name: value for name, value in names.items() if name in takes} | settings
    return getattr(diffusers, class_name).from_config(scheduler.config, **settings)
