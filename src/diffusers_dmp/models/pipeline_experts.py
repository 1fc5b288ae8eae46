"""The experts of pipelines that have several denoisers themselves: Wan2.2's two transformers, and this package's SNR split.

Legend: E experts, T training timesteps.
"""

import math
from collections.abc import Sequence
from typing import Any

from diffusers.models.modeling_utils import ModelMixin

from ..intervals import NoiseIntervals
from ..saving.naming import descends_from


def experts_in_pipeline(pipeline: Any) -> tuple[list[ModelMixin], NoiseIntervals]:
    """
    Return the denoisers of a pipeline and their noise intervals.

    Args:
        pipeline ([`DiffusionPipeline`]): One of Wan2.2's, with `transformer` for much noise, `transformer_2` for little noise and
            `boundary_ratio`, or a [`SNRSplitPipeline`].

    Returns:
        E denoisers, that for the least noise first, and their [`NoiseIntervals`].

    Raises:
        ValueError: if it is another pipeline, lacks one of these, or its denoisers predict different things.
    """
    if descends_from(pipeline, "SNRSplitPipeline"):
        kinds = pipeline.config.prediction_types
        if len(set(kinds)) > 1:
            raise ValueError(
                f"Expected denoisers that predict the same, since a pipeline with one denoiser is told once, but got {kinds}."
            )
        return pipeline.denoisers, pipeline.intervals()
    _check_takes_two(pipeline)
    missing = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name) is None]
    missing += [] if pipeline.config.boundary_ratio is not None else ["boundary_ratio"]
    if missing:
        raise ValueError(
            f"Expected a pipeline with two transformers and the boundary between them, but got a {type(pipeline).__name__} "
            f"without {', '.join(f'`{name}`' for name in missing)}."
        )
    num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
    intervals = NoiseIntervals.from_sigmas([pipeline.config.boundary_ratio], num_train_timesteps)
    return [pipeline.transformer_2, pipeline.transformer], intervals


def put_into_pipeline(experts: Sequence[ModelMixin], intervals: NoiseIntervals, pipeline: Any) -> None:
    """
    Make two experts the transformers of one of Wan2.2's pipelines, the inverse of [`experts_in_pipeline`].

    Args:
        experts (`list[ModelMixin]` of length 2): The one for less noise first.
        intervals ([`NoiseIntervals`]): Their intervals.
        pipeline ([`DiffusionPipeline`]): It is changed.

    Raises:
        ValueError: if there are more or fewer experts, or it is another pipeline.
    """
    _check_takes_two(pipeline)
    if len(experts) != 2:
        raise ValueError(
            f"Expected 2 experts for a {type(pipeline).__name__}, which has a `transformer` and a `transformer_2`, but got "
            f"{len(experts)}."
        )
    intervals.check_scheduler(pipeline.scheduler)
    low, high = experts
    pipeline.register_modules(transformer=high, transformer_2=low)
    pipeline.register_to_config(boundary_ratio=_ratio(intervals.edges[1], intervals.num_train_timesteps))


def check_is_not_offloaded(pipeline: Any) -> None:
    """
    Check that `enable_model_cpu_offload` is off, whose hooks belong to the components that a pipeline has at that moment.

    Raises:
        ValueError: if it is on.
    """
    if getattr(pipeline, "_all_hooks", None):
        raise ValueError(
            "Expected a pipeline without `enable_model_cpu_offload`, which has to know all of its components, but got one with "
            "it; `pipeline.remove_all_hooks()` ends it, and it can be enabled again afterwards."
        )


def _check_takes_two(pipeline: Any) -> None:
    if "transformer_2" not in pipeline.components or "boundary_ratio" not in pipeline.config:
        raise ValueError(
            "Expected a pipeline with a `transformer`, a `transformer_2` and a `boundary_ratio`, as those of Wan2.2 have, but "
            f"got a {type(pipeline).__name__} with {', '.join(sorted(pipeline.components))}."
        )


def _ratio(edge: float, num_train_timesteps: int) -> float:
    """The boundary ratio r of an edge, with r·T <= edge also in floating point: the pipelines ask whether t >= r·T."""
    ratio = edge / num_train_timesteps
    return ratio if ratio * num_train_timesteps <= edge else math.nextafter(ratio, 0.0)
