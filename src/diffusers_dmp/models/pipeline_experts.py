"""The experts of pipelines that have several denoisers themselves: Wan2.2's two transformers, and this package's SNR split.

Legend: E experts, T training timesteps.
"""

import math
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..intervals import NoiseIntervals
from ..saving.naming import descends_from


class PipelineExpertsMixin:
    """Make experts of a pipeline that has several denoisers, and put them back."""

    # what `DenoiserExperts` provides
    experts: nn.ModuleList
    intervals: NoiseIntervals

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Any:
        """
        Make one model of a pipeline's denoisers, which are shared, not copied: of Wan2.2's two transformers, or an SNR split's.

        ```py
        experts = DenoiserExperts.from_pipeline(pipe)
        pipe.register_modules(transformer=experts, transformer_2=None)
        pipe.register_to_config(boundary_ratio=None)
        ```

        A pipeline with one denoiser has one `guidance_scale`: without a `boundary_ratio`, Wan2.2's pipelines refuse
        `guidance_scale_2`. To keep it, keep the ratio, with these experts as both `transformer` and `transformer_2`.

        Args:
            pipeline ([`DiffusionPipeline`]): With `transformer` for much noise, `transformer_2` for little noise and
                `boundary_ratio` between them ([`WanPipeline`] and those like it); or a [`SNRSplitPipeline`], whose
                `guidance_scales` are not taken over. It is not changed.

        Returns:
            [`DenoiserExperts`]

        Raises:
            ValueError: if it has no two transformers with a boundary, its denoisers predict different things, or
                `enable_model_cpu_offload` is on.
        """
        _check_is_not_offloaded(pipeline)
        experts, intervals = experts_in_pipeline(pipeline)
        return cls(experts=experts, intervals=intervals)  # type: ignore[call-arg]

    def to_pipeline(self, pipeline: Any) -> Any:
        """
        Make two experts a pipeline's `transformer` and `transformer_2`, the inverse of [`~DenoiserExperts.from_pipeline`].

        Args:
            pipeline ([`DiffusionPipeline`]): One of Wan2.2's. It is changed, its `boundary_ratio` too.

        Returns:
            The pipeline.

        Raises:
            ValueError: if there are not two experts, the pipeline has no place for them (`SNRSplitPipeline.from_pipe` makes one
                of a pipeline with experts), its scheduler has another number of training timesteps, or
                `enable_model_cpu_offload` is on.
        """
        _check_is_not_offloaded(pipeline)
        _check_takes_two(pipeline)
        if len(self.experts) != 2:
            raise ValueError(
                f"Expected 2 experts for a {type(pipeline).__name__}, which has a `transformer` and a `transformer_2`, but got "
                f"{len(self.experts)}."
            )
        self.intervals.check_scheduler(pipeline.scheduler)
        low, high = self.experts
        pipeline.register_modules(transformer=high, transformer_2=low)
        pipeline.register_to_config(boundary_ratio=_ratio(self.intervals.edges[1], self.intervals.num_train_timesteps))
        return pipeline


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


def _check_is_not_offloaded(pipeline: Any) -> None:
    """Check that `enable_model_cpu_offload` is off: its hooks belong to the components that a pipeline had when it was enabled."""
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
