"""The methods `full` and `denoiser_experts`: all weights of the denoiser, or of one denoiser for each noise interval."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...intervals import NoiseIntervals
from ...models.denoiser_experts import DenoiserExperts
from ..denoiser import TextDenoiser
from ..pipeline_output import save_whole
from ..recipe import TrainingRecipe
from .source import SourcePipeline

if TYPE_CHECKING:
    from .arguments import TextToImageArguments

SECOND = "transformer_2"  # the expert for little noise in Wan2.2's pipelines


def train_full(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """All weights of the denoiser, saved as a whole pipeline. See [`TrainingMethod`]."""

    def save_to(model: nn.Module, folder: Path) -> None:
        save_whole(source.whole_pipeline(model), folder)

    return source.denoiser, TrainingRecipe(save_to=save_to)


def train_denoiser_experts(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """
    A denoiser for each interval, saved as a whole pipeline with all of them; see [`TrainingMethod`].

    They begin as the experts that the pipeline has, [`DenoiserExperts`] or Wan2.2's two transformers, or else as copies of its
    denoiser. With `--expert i`, one is trained, and the others are saved as they were.
    """
    assert intervals is not None  # a method with `IntervalArguments`
    only = args.single_expert
    has_two = source.boundary is not None
    if has_two:
        expect_intervals((0, source.boundary, source.num_train_timesteps), intervals, source)
        if len(source.denoisers) == 1:
            return _one_of_two(source)
    experts = first_experts(source, intervals)
    first, model = experts.experts[0], experts if only is None else experts.experts[only]
    if only is not None:
        experts.requires_grad_(False)
        model.requires_grad_(True)
    # samples are generated with what is trained, called as in the training
    source.pipeline.register_modules(**{source.family.component: experts} | ({SECOND: None} if has_two else {}))
    if has_two:
        source.pipeline.register_to_config(boundary_ratio=None)
    source.called = experts

    def save_to(model: nn.Module, folder: Path) -> None:
        trained: list[Any] = list(model.experts if only is None else experts.experts)  # type: ignore[arg-type]
        if only is not None:
            trained[only] = model
        if has_two:
            saved = dict(zip((SECOND, source.family.component), trained))
        else:
            saved = {source.family.component: DenoiserExperts(trained, intervals)}
        save_whole(source.pipeline_with(**saved), folder)

    call = TextDenoiser(source.family.call, first, source.num_train_timesteps)
    return model, TrainingRecipe(denoiser=call, save_to=save_to)


def _one_of_two(source: SourcePipeline) -> tuple[nn.Module, TrainingRecipe]:
    """That one of Wan2.2's transformers which is loaded."""
    ((name, model),) = source.denoisers.items()

    def save_to(model: nn.Module, folder: Path) -> None:
        save_whole(source.pipeline_with(**{name: model}), folder)

    return model, TrainingRecipe(save_to=save_to)


def first_experts(source: SourcePipeline, intervals: NoiseIntervals) -> DenoiserExperts:
    """
    The experts that a training begins with.

    Args:
        source ([`SourcePipeline`]): The pipeline.
        intervals ([`NoiseIntervals`]): Those that the arguments ask for.

    Raises:
        ValueError: if the pipeline has experts of other intervals.
    """
    denoiser = source.called
    if isinstance(denoiser, DenoiserExperts):
        expect_intervals(denoiser.intervals.edges, intervals, source)
        return denoiser
    copies = [copy.deepcopy(denoiser) for _ in range(intervals.num_experts - 1)]
    return DenoiserExperts([denoiser, *copies], intervals)  # type: ignore[list-item]


def expect_intervals(own: Sequence[float | None], wanted: NoiseIntervals, source: SourcePipeline) -> None:
    """
    Check that a pipeline's experts have the intervals that the arguments ask for.

    Args:
        own (`Sequence[float]`): The edges of the pipeline's experts.
        wanted ([`NoiseIntervals`]): What the arguments ask for.
        source ([`SourcePipeline`]): The pipeline.

    Raises:
        ValueError: if not.
    """
    if tuple(own) != tuple(wanted.edges):
        then, now = (" ".join(f"{edge:g}" for edge in edges[1:-1]) for edges in (own, wanted.edges))
        raise ValueError(
            f"Expected the boundaries of the experts in {source.name!r}, `--timestep_boundaries {then}`, but got {now}."
        )
