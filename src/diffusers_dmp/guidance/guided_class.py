"""The class of a guided scheduler: derived from [`GuidedScheduler`] and from the class of the scheduler that it guides."""

import functools
import inspect
from typing import Any


@functools.cache
def guided_class(base: Any, scheduler_class: Any) -> type:
    """
    Derive a class from [`GuidedScheduler`] and from a scheduler's class.

    It has the name and module of the scheduler's class, because Diffusers saves schedulers under these, and they are saved
    without guidance.
    """

    class Guided(base, scheduler_class):  # type: ignore[valid-type, misc]
        unguided_class = scheduler_class
        __doc__ = scheduler_class.__doc__
        __module__ = scheduler_class.__module__

        @functools.wraps(scheduler_class.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            call = inspect.signature(super().set_timesteps).bind(*args, **kwargs)
            device, call.arguments["device"] = call.arguments.get("device"), "cpu"
            super().set_timesteps(*call.args, **call.kwargs)
            self._begin(device)

        @functools.wraps(scheduler_class.step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            return self._guided_step(super().step, model_output, timestep, sample, *args, **kwargs)

    Guided.__name__ = scheduler_class.__name__
    Guided.__qualname__ = f"{base.__name__}[{scheduler_class.__name__}]"
    return Guided
