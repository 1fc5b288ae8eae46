"""The method `routing`: the whole denoiser with task routing (DTR, https://arxiv.org/abs/2310.07138)."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ...intervals import NoiseIntervals
from ...plugins.task_routing import TaskRouting
from ..pipeline_output import save_whole
from ..recipe import TrainingRecipe
from .source import SourcePipeline

if TYPE_CHECKING:
    from .arguments import TextToImageArguments


def train_routing(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """All weights, with routed channels; saved as a whole pipeline. See [`TrainingMethod`]."""
    routing = TaskRouting(args.sharing_ratio, args.routing_alpha, source.num_train_timesteps)
    routing.attach(source.denoiser)

    def save_to(model: nn.Module, folder: Path) -> None:
        save_whole(source.whole_pipeline(model), folder)

    return source.denoiser, TrainingRecipe(save_to=save_to)
