"""The noise that a pipeline's denoisers were trained with, which its configuration records, whatever scheduler it is given."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import are_same_levels, is_flow_matching
from ..diffusion.noise_schedules import noise_schedule_of, scheduler_of_training
from ..saving.pipeline_mixin import StandalonePipelineMixin
from .scheduling import with_trained_noise


class TrainedNoiseMixin(StandalonePipelineMixin):
    """Record the noise of training in the configuration of a pipeline, save it, load it, and hand it on to other pipelines."""

    # what `DiffusionPipeline` and the pipeline provide
    config: Any
    config_name: str
    scheduler: SchedulerMixin
    register_to_config: Callable[..., None]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "TrainedNoiseMixin":
        """
        Load a pipeline; see [`DiffusionPipeline.from_pretrained`].

        A `scheduler` that is given has to fit the noise that the denoisers were trained with: `noise_schedule` in the folder's
        configuration, or in an older folder that of its scheduler. With `noise_schedule=None` the given scheduler says it.
        """
        if kwargs.get("scheduler") is not None and "noise_schedule" not in kwargs:
            kwargs |= _saved_noise(Path(pretrained_model_name_or_path), cls.config_name)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[return-value]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Any:
        """
        Make a pipeline of the components of another one; see [`~StandalonePipelineMixin.from_pipe`].

        The noise of training stays the other pipeline's, also with another `scheduler`.
        """
        kwargs.setdefault("noise_schedule", trained_noise_of(pipeline))
        return super().from_pipe(pipeline, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        Save all components, the scheduler with the noise schedule of training; see [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if the scheduler was given another noise schedule.
        """
        with self._using(with_trained_noise(self.scheduler, self._trained_scheduler)):
            super().save_pretrained(save_directory, *args, **kwargs)

    def _set_up_noise(self, scheduler: SchedulerMixin, noise_schedule: dict[str, Any] | None) -> None:
        """
        Record the noise that the denoisers were trained with: by default that of the scheduler which the pipeline is made with.

        Raises:
            ValueError: if the scheduler does not fit a given `noise_schedule`.
        """
        recorded = noise_schedule_of(scheduler) if noise_schedule is None else noise_schedule
        self.register_to_config(noise_schedule=recorded)
        self._trained_scheduler = scheduler if recorded is None else scheduler_of_training(recorded)
        with_trained_noise(scheduler, self._trained_scheduler)  # raises if it does not fit

    @contextmanager
    def _using(self, scheduler: SchedulerMixin) -> Iterator[None]:
        """Show a scheduler as the pipeline's own for a while."""
        own, self.scheduler = self.scheduler, scheduler
        try:
            yield
        finally:
            if self.scheduler is scheduler:  # a callback may have set another one
                self.scheduler = own


def trained_noise_of(pipeline: DiffusionPipeline) -> dict[str, Any] | None:
    """
    Return the record of the noise that a pipeline's denoisers were trained with.

    Args:
        pipeline ([`DiffusionPipeline`]): This package's, or another one, whose scheduler is taken to be that of training.
    """
    config: Any = pipeline.config
    scheduler = getattr(pipeline, "scheduler", None)
    return config.get("noise_schedule") or (None if scheduler is None else noise_schedule_of(scheduler))


def trained_scheduler_of(pipeline: DiffusionPipeline) -> SchedulerMixin:
    """A scheduler with the noise that a pipeline's denoisers were trained with; its own one, if there is no record of it."""
    recorded = trained_noise_of(pipeline)
    return pipeline.scheduler if recorded is None else scheduler_of_training(recorded)


def have_same_noise(first: SchedulerMixin, second: SchedulerMixin) -> bool:
    """Tell whether two schedulers add the same noise at each training timestep, up to rounding."""
    levels, others = (getattr(each, "alphas_cumprod", None) for each in (first, second))
    if levels is None or others is None:
        return levels is others and is_flow_matching(first) == is_flow_matching(second)
    return are_same_levels(levels, others)


def _saved_noise(folder: Path, index_name: str) -> dict[str, Any]:
    """The argument `noise_schedule` for a local folder without a record, which has a scheduler of Diffusers."""
    index, config = folder / index_name, folder / "scheduler" / SchedulerMixin.config_name
    if not (index.is_file() and config.is_file()) or "noise_schedule" in json.loads(index.read_text(encoding="utf-8")):
        return {}
    class_name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    scheduler_class: Any = getattr(diffusers, str(class_name), None)
    if scheduler_class is None:
        return {}
    return {"noise_schedule": noise_schedule_of(scheduler_class.from_pretrained(config.parent))}
