"""Trainings of several denoisers that are put together in one pipeline, each for an interval of noise levels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..intervals import NoiseIntervals
from ..pipelines import SNRSplitPipeline
from .data.training_data import TrainingData
from .experts import ExpertTraining, train_experts
from .pipeline_output import save_whole
from .summary import TrainingSummary
from .trainer import make_accelerator


def train_split(
    args: Any,
    data: TrainingData,
    intervals: NoiseIntervals,
    snr_boundaries: Sequence[float],
    prepare: Callable[[int], ExpertTraining],
) -> None:
    """
    Train one denoiser, or all of them in turn and put them together in one pipeline.

    Args:
        args ([`TrainingArguments`] with [`ExpertArguments`]): Everything that can be set. A denoiser is trained in the folder `expert_<index>`, the only
            one in `output_dir` itself.
        data ([`TrainingData`]): What they are trained on.
        intervals ([`NoiseIntervals`]): Which denoiser owns which noise.
        snr_boundaries (`Sequence[float]`): The signal-to-noise ratios between them, which the pipeline saves.
        prepare (`Callable[[int], ExpertTraining]`): See [`train_experts`].
    """
    accelerator = make_accelerator(args)
    is_split = intervals.num_experts > 1
    folders = [Path(args.output_dir, f"expert_{expert}") for expert in range(intervals.num_experts)]
    folders = folders if is_split else [Path(args.output_dir)]
    experts = args.chosen_experts(intervals.num_experts)
    train_experts(args, data, folders, experts, prepare)
    if len(experts) > 1 and accelerator.is_main_process:
        parts = [DiffusionPipeline.from_pretrained(folder / "pipeline") for folder in folders]
        pipeline = SNRSplitPipeline.from_pipelines(parts, list(snr_boundaries))
        save_whole(pipeline, Path(args.output_dir, "pipeline"))
        TrainingSummary.of_experts(folders).save(args.output_dir)
    accelerator.end_training()
