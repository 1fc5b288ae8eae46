"""Which schedulers can be guided, and by which experts."""

import inspect
from typing import Any

from ..diffusion.noise import is_flow_matching
from ..diffusion.predictions import FLOW_PREDICTION, PREDICTION_TYPES, check_noise_levels, expected_prediction_type
from ..diffusion.timesteps import check_counts_timesteps
from .experts import GuidanceExperts
from .step_schedule import check_direction


def check_scheduler_for_guidance(scheduler: Any) -> None:
    """
    Check that the steps of a scheduler can be guided.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers.

    Raises:
        ValueError: if its noise levels or what it predicts are not known, its timesteps are none of training, or its steps need
            something else than a prediction or go from images to noise.
    """
    check_noise_levels(scheduler)
    check_counts_timesteps(scheduler)
    parameters = inspect.signature(scheduler.step).parameters.values()
    inputs = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][:3]
    has_stages = "stage_index" in inspect.signature(scheduler.set_timesteps).parameters  # of different sizes
    if inputs != ["model_output", "timestep", "sample"][: len(inputs)] or has_stages:
        raise ValueError(
            "Expected `scheduler` to step from a prediction, a timestep and a sample, and from noise to an image of one size, but "
            f"got a {type(scheduler).__name__}."
        )
    if getattr(scheduler, "timesteps", None) is not None and not is_flow_matching(scheduler):
        check_direction(scheduler)  # all are checked when their timesteps are set, these before as well
    kind = expected_prediction_type(scheduler)
    known = (FLOW_PREDICTION,) if is_flow_matching(scheduler) else PREDICTION_TYPES
    if kind not in known:
        raise ValueError(
            f"Expected the `prediction_type` of a {type(scheduler).__name__} to be one of {', '.join(known)}, but got {kind!r}."
        )


def check_process(experts: GuidanceExperts, scheduler: Any) -> None:
    """
    Check that experts know the noise that they were trained on, where it matters.

    A single expert need not, for flow matching: a classifier of clean images is one.

    Args:
        experts ([`GuidanceExperts`]): The experts.
        scheduler ([`SchedulerMixin`]): The scheduler whose steps they guide.

    Raises:
        ValueError: if they do not and there are several for flow matching, or they count other timesteps than the scheduler.
    """
    if experts.process is not None:
        return
    if not is_flow_matching(scheduler):
        experts.intervals.check_scheduler(scheduler)
    elif experts.config.num_experts > 1:
        raise ValueError(
            f"Expected experts that know which noise they were trained on, for a {type(scheduler).__name__}, but got "
            f"{experts.config.num_experts} without `noise_schedule`. For diffusion it has the arguments of the DDPMScheduler of their "
            "training, for flow matching it is {'process': 'flow_matching'}."
        )
