"""The steps of a guided scheduler, and its class, which has them in the place of the scheduler's own.

Legend: B batch, S steps; the other dimensions of a sample are its own.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import is_flow_matching
from ..diffusion.predictions import expected_prediction_type
from ..diffusion.timesteps import counts_from_noise, move_sigmas_to_samples
from .gradient import Guidance
from .step_schedule import NoisyStep, StepSchedule
from .steps import guided_prediction, step_with_guided_mean, unclipped

_TIMESTEPS_WITH_SAMPLES = ("CogVideoXDDIMScheduler",)  # CogView 3's denoiser does not move them there


class GuidedStepsMixin(SchedulerMixin):
    """
    The steps of a [`GuidedScheduler`], for a class that derives from this one and from a scheduler's: see [`guided_class`].

    Attributes:
        scheduler ([`SchedulerMixin`]): The scheduler without this guidance.
        guidance ([`Guidance`]): What guides.
    """

    scheduler: SchedulerMixin
    guidance: Guidance
    _schedule: "StepSchedule | None"
    _first_position: "int | None"  # of the steps that are taken, if an image is given: img2img

    @property
    def guides_mean(self) -> bool:
        """Whether the mean of a step is guided, as for DDPM, or else the noise."""
        return isinstance(self, (DDPMScheduler, DDPMParallelScheduler))

    def _guidances(self) -> list[Guidance]:
        """Its own guidance, and then that of each guided scheduler inside."""
        inner = self.scheduler._guidances() if isinstance(self.scheduler, GuidedStepsMixin) else []
        return [self.guidance, *inner]

    def _guided_step(
        self, step: Callable, model_output: torch.Tensor, timestep, sample: torch.Tensor, *args, **kwargs
    ):
        """A step of the scheduler with guidance, where `step` is the one without."""
        call = inspect.signature(step).bind(model_output, timestep, sample, *args, **kwargs)
        if (call.arguments | kwargs).get("per_token_timesteps") is not None:
            raise ValueError("Expected one timestep for the whole of a sample, but got `per_token_timesteps`.")
        schedule = self._steps()
        with schedule.on_cpu(self):
            position = self._position(timestep)
            if self._first_position is None:
                self._first_position = position
            if isinstance(timestep, torch.Tensor):
                timestep = schedule.timesteps[position]
            guidances = [guidance for guidance in self._guidances() if self._is_guided(position, guidance)]
            if not guidances:
                result = step(model_output, timestep, sample, *args, **kwargs)
            elif self.guides_mean:
                call.arguments["timestep"] = int(schedule.timesteps[position])
                noisy = self._noisy_step(position, model_output, sample)
                result = step_with_guided_mean(self, step, call, noisy, guidances)
            else:
                prediction = self._signed(model_output)
                noisy = self._noisy_step(position, prediction, sample)
                guided = self._signed(guided_prediction(self, noisy, prediction, guidances))
                with unclipped(self):
                    result = step(guided, timestep, sample, *args, **kwargs)
        if position == len(schedule.timesteps) - 1:
            for guidance in self._guidances():
                guidance.raise_if_nonfinite()
        return result

    def _begin(self, device: "torch.device | str | None") -> None:
        """Begin with steps that were made on the CPU, so that none waits for an accelerator to know which one it is."""
        self._schedule, self._first_position = None, None
        schedule, name = self._steps(), type(self).__name__
        # the others do not count their steps, but look for the timestep that they are given
        if hasattr(self, "step_index") or name in _TIMESTEPS_WITH_SAMPLES:
            self.timesteps: torch.Tensor = self.timesteps.to(device)
            self._schedule = schedule = replace(schedule, moved=self.timesteps)
        move_sigmas_to_samples(self, device)
        trained = schedule.training_timesteps.tolist()
        for guidance in self._guidances():
            guidance.reset()
            if not any(self._is_guided(position, guidance) for position in range(len(trained))):
                warnings.warn(
                    f"None of the {len(trained)} steps is guided, at the timesteps {trained[0]:g} to {trained[-1]:g} of training: "
                    f"`timestep_range` is {guidance.timestep_range or schedule.default_range}.",
                    stacklevel=4,
                )

    def _steps(self) -> StepSchedule:
        """The timesteps and noise levels of all steps."""
        if self._schedule is None or not self._schedule.is_of(self):
            self._schedule = StepSchedule.of(self, self.experts.intervals.num_train_timesteps)
        return self._schedule

    def _position(self, timestep) -> int:
        """The index in `timesteps` of the step that is taken."""
        for name in ("step_index", "begin_index"):  # a second-order scheduler has each timestep twice
            index = getattr(self, name, None)
            if index is not None:
                return index
        return self._steps().position_of(timestep, self)

    def _is_guided(self, position: int, guidance: Guidance) -> bool:
        """Whether guidance applies. Of a second-order scheduler's step both evaluations are guided, or neither."""
        schedule, first = self._steps(), self._first_position or 0
        order = getattr(self, "order", 1)  # UnCLIPScheduler has none
        begins = position // order * order  # with its first evaluation
        if not (schedule.can_be_guided(begins) and schedule.can_be_guided(position)):
            return False
        step = begins // order - first // order
        return guidance.applies(schedule.training_timesteps[begins], step, schedule.default_range)

    def _signed(self, prediction: torch.Tensor) -> torch.Tensor:
        """The velocity ε - x0 of one that Mochi's scheduler takes, x0 - ε, and the other way round."""
        return -prediction if is_flow_matching(self) and counts_from_noise(self) else prediction

    def _noisy_step(self, position: int, model_output: torch.Tensor, sample: torch.Tensor) -> NoisyStep:
        """The input of a step as guidance needs it."""
        schedule = self._steps()
        is_flow = is_flow_matching(self)
        x_t = sample if is_flow else self.scale_model_input(sample, schedule.timesteps[position])
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        prediction = model_output[:, : sample.shape[1]].to(x_t.dtype)
        return NoisyStep(self, schedule, position, x_t, prediction, expected_prediction_type(self))


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
