"""Which denoisers of a pipeline get LoRA experts, and which noise levels each of them owns.

Legend: E experts, T training timesteps.
"""

import logging
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..intervals import NoiseIntervals
from ..saving.adapters import check_component

logger = logging.getLogger(__name__)

Weighted = tuple[str, float]
WeightedAdapters = tuple[tuple[Weighted, ...], ...]


@dataclass(frozen=True)
class LoraTarget:
    """
    A denoiser to attach experts to.

    Args:
        denoiser (`nn.Module`): The denoiser.
        adapters (`tuple` of length E): Its adapters for each interval, with their weights.
        intervals ([`NoiseIntervals`]): The intervals.
        pipeline ([`DiffusionPipeline`], *optional*): The pipeline that it is part of.
        component (`str`): Its name there.
    """

    denoiser: nn.Module
    adapters: WeightedAdapters
    intervals: NoiseIntervals
    pipeline: DiffusionPipeline | None = None
    component: str = "denoiser"

    @property
    def names(self) -> list[str]:
        """The adapters that occur, each once."""
        return list(dict.fromkeys(name for entry in self.adapters for name, _ in entry))


def lora_targets(
    target: nn.Module | DiffusionPipeline, adapters: WeightedAdapters, intervals: NoiseIntervals
) -> list[LoraTarget]:
    """
    Choose the denoisers to attach experts to.

    Of a pipeline with two transformers (Wan2.2), each gets the adapters of the intervals that it denoises in. An interval on
    both sides of the pipeline's `boundary_ratio` belongs to both.

    Args:
        target (`nn.Module` or [`DiffusionPipeline`]): A denoiser, or a pipeline.
        adapters (`tuple` of length E): The adapters for each interval, with their weights.
        intervals ([`NoiseIntervals`]): The intervals.

    Raises:
        ValueError: if the pipeline has no denoiser or several, or other training timesteps than the intervals.
    """
    if not isinstance(target, DiffusionPipeline):
        check_component("target", target)
        return [LoraTarget(unwrap_module(target), adapters, intervals)]
    intervals.check_scheduler(target.scheduler)
    targets = []
    for component, (low, high) in _owned_timesteps(target, intervals).items():
        denoiser: Any = getattr(target, component)
        check_component(component, denoiser)
        edges = zip(intervals.edges, intervals.edges[1:])
        owned = tuple(entry if begin < high and end > low else () for entry, (begin, end) in zip(adapters, edges))
        targets.append(LoraTarget(unwrap_module(denoiser), owned, intervals, target, component))
    return targets


def _owned_timesteps(pipeline: Any, intervals: NoiseIntervals) -> dict[str, tuple[float, float]]:
    """The timesteps at which a pipeline calls each of its denoisers, by their names."""
    total = intervals.num_train_timesteps
    found = [name for name in ("transformer", "transformer_2", "unet") if getattr(pipeline, name, None) is not None]
    ratio = pipeline.config.get("boundary_ratio")
    if "transformer_2" in found and ratio is not None:
        boundary = round(ratio * total, 9)  # as in `NoiseIntervals.from_sigmas`
        if intervals.num_experts > 1 and boundary not in intervals.edges:
            logger.warning(
                "The %s changes from one transformer to the other at its `boundary_ratio` %g, the timestep %g, but the intervals "
                "have their edges at %s: the adapters of the interval around it are used in both.",
                type(pipeline).__name__,
                ratio,
                boundary,
                ", ".join(f"{edge:g}" for edge in intervals.edges),
            )
        owned = {"transformer": (boundary, float(total)), "transformer_2": (0.0, boundary)}
        return {name: timesteps for name, timesteps in owned.items() if name in found}
    if len(found) != 1:
        raise ValueError(
            f"Expected a pipeline with one `transformer` or `unet`, or with two transformers and a `boundary_ratio`, but got a "
            f"{type(pipeline).__name__} with {', '.join(found) or 'none'}; attach to a denoiser of it."
        )
    return {found[0]: (0.0, float(total))}
