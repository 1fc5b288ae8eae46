"""The methods `full` and `denoiser_experts`: all weights of the denoiser, or of one denoiser for each noise interval."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from torch import nn

from ...intervals import NoiseIntervals
from ...models.denoiser_experts import DenoiserExperts
from ...models.pipeline_experts import experts_in_pipeline
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
    experts, has_two = first_experts(source, intervals)
    only = args.single_expert
    if only is not None:
        for index, expert in enumerate(experts.experts):
            expert.requires_grad_(index == only)
    source.pipeline.register_modules(**{source.family.component: experts} | ({SECOND: None} if has_two else {}))
    if has_two:
        source.pipeline.register_to_config(boundary_ratio=None)  # these experts know the boundary

    def save_to(model: nn.Module, folder: Path) -> None:
        trained = list(model.experts if only is None else experts.experts)  # type: ignore[arg-type,union-attr]
        if only is not None:
            trained[only] = model
        if has_two:
            low, high = trained
            pipeline = source.whole_pipeline(high, **{SECOND: low})
        else:
            pipeline = source.whole_pipeline(DenoiserExperts(trained, intervals))
        save_whole(pipeline, folder)

    call = TextDenoiser(source.family.call, experts.experts[0], source.num_train_timesteps)
    model = experts if only is None else experts.experts[only]
    return model, TrainingRecipe(passes_expert=False, denoiser=call, save_to=save_to)


def first_experts(source: SourcePipeline, intervals: NoiseIntervals) -> tuple[DenoiserExperts, bool]:
    """
    The experts that a training begins with.

    Args:
        source ([`SourcePipeline`]): The pipeline.
        intervals ([`NoiseIntervals`]): Those that the arguments ask for.

    Returns:
        The experts, and whether they are the two transformers of a pipeline of Wan2.2.

    Raises:
        ValueError: if the pipeline has experts of other intervals.
    """
    denoiser = source.denoiser
    if isinstance(denoiser, DenoiserExperts):
        expect_intervals(denoiser.intervals, intervals, source)
        return denoiser, False
    index: Any = DiffusionPipeline.load_config(source.name)
    if index.get(SECOND, [None])[0] is not None and index.get("boundary_ratio") is not None:
        second = getattr(source.pipeline, SECOND)
        if second is None:
            second = type(denoiser).from_pretrained(source.name, subfolder=SECOND, torch_dtype=source.dtype)
        source.pipeline.register_modules(**{SECOND: second.requires_grad_(True)})
        source.pipeline.register_to_config(boundary_ratio=index["boundary_ratio"])
        found, own = experts_in_pipeline(source.pipeline)
        expect_intervals(own, intervals, source)
        return DenoiserExperts(found, intervals), True
    copies = [denoiser, *(copy.deepcopy(denoiser) for _ in range(intervals.num_experts - 1))]
    return DenoiserExperts(copies, intervals), False


def expect_intervals(own: NoiseIntervals, wanted: NoiseIntervals, source: SourcePipeline) -> None:
    """
    Check that a pipeline's experts have the intervals that the arguments ask for.

    Raises:
        ValueError: if not.
    """
    if own.edges != wanted.edges:
        boundaries = " ".join(f"{edge:g}" for edge in own.edges[1:-1])
        raise ValueError(
            f"Expected the boundaries of the experts in {source.name!r}, `--timestep_boundaries {boundaries}`, but got "
            f"{' '.join(f'{edge:g}' for edge in wanted.edges[1:-1])}."
        )
