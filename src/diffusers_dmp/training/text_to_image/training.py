"""A whole training of a text-to-image pipeline: its parts by the method that the arguments name, and the one loop."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from torch import nn

from ...intervals import NoiseIntervals
from ..conditions import TextConditions
from ..data.encoded_text import EncodedText, load_encoded_text
from ..data.loop_data import LoopData
from ..data.streamed_text import load_streamed_text
from ..denoiser import TextDenoiser
from ..objectives.ddpm import DiffusionObjective
from ..objectives.from_arguments import make_flow_objective
from ..objectives.objective import Objective
from ..precision import PRECISIONS
from ..recipe import TrainingRecipe
from ..run import Publisher
from ..trainer import make_accelerator, train
from .arguments import TextToImageArguments
from .methods import METHODS
from .samples import PromptSamples
from .source import SourcePipeline


@dataclasses.dataclass(kw_only=True)
class TextToImageParts:
    """
    What a text-to-image training hands to the loop.

    Args:
        source ([`SourcePipeline`]): The pipeline, with the denoiser that is trained.
        model (`nn.Module`): What is trained, called as the denoiser is.
        objective ([`Objective`]), data ([`LoopData`]), recipe ([`TrainingRecipe`]): See [`train`].
    """

    source: SourcePipeline
    model: nn.Module
    objective: Objective
    data: LoopData
    recipe: TrainingRecipe


def train_text_to_image(args: TextToImageArguments, publisher: Publisher | None = None) -> None:
    """
    Train the denoiser of a text-to-image pipeline, or adapters of it.

    Args:
        args ([`TextToImageArguments`]): Everything that can be set.
        publisher ([`Publisher`], *optional*): See [`train`].

    Raises:
        ValueError: if the arguments do not fit each other, the pipeline or the data; see also [`train`].
        OSError: if there is no such pipeline.
    """
    method = METHODS[args.method]
    expert = args.single_expert if method.has_experts else None
    if expert is not None:
        args = dataclasses.replace(args, output_dir=str(Path(args.output_dir, f"expert_{expert}")))
    has_several = method.has_experts and expert is None and args.count_experts() > 1
    accelerator = make_accelerator(args, find_unused_parameters=has_several)
    parts = prepare_parts(accelerator, args)
    train(accelerator, args, parts.model, parts.objective, parts.data, parts.recipe, publisher)
    accelerator.end_training()


def prepare_parts(accelerator: Accelerator, args: TextToImageArguments) -> TextToImageParts:
    """
    Everything that a training hands to the loop; the noise process in `args` becomes the pipeline's.

    Args:
        accelerator (`Accelerator`): For the device and the precision.
        args ([`TextToImageArguments`]): Everything that can be set.
    """
    dtype = PRECISIONS[accelerator.mixed_precision]
    trained = prepare_model(args, dtype)
    source, intervals = trained.source, trained.intervals
    objective = make_text_objective(args, source)
    if args.streaming:
        data: EncodedText = load_streamed_text(accelerator, args, args.shuffle_buffer_size)
    else:
        data = load_encoded_text(accelerator, args)
    data.check_pipeline(source.pipeline, source.name)
    generate = None
    if args.sample_steps and (
        accelerator.is_main_process or accelerator.is_fsdp2
    ):  # sharded weights generate everywhere
        generate = PromptSamples(source, args)
        if source.pipeline.vae is not None:  # or else it generates pixels
            source.pipeline.vae.to(accelerator.device)
    # what is trained goes there when it is wrapped or sharded; the experts beside it are needed for samples alone
    if not METHODS[args.method].trains_weights or (generate is not None and args.single_expert is not None):
        source.called.to(accelerator.device)
    empty_prompt = {name: column.to(accelerator.device) for name, column in data.empty_prompt.items()}
    expert_batches: Any = "density" if args.expert_shares == "density" else args.expert_batches
    recipe = dataclasses.replace(
        trained.recipe,
        denoiser=trained.recipe.denoiser
        or TextDenoiser(source.family.call, source.denoiser, source.num_train_timesteps),
        conditions=TextConditions(empty_prompt, args.prompt_dropout_prob),
        expert_intervals=intervals,
        expert=None if intervals is None else args.single_expert,
        expert_batches=expert_batches,
        passes_expert=False,
        make_pipeline=lambda model: source.sampling_pipeline(),
        generate=generate,
    )
    return TextToImageParts(source=source, model=trained.model, objective=objective, data=data, recipe=recipe)


@dataclasses.dataclass(kw_only=True)
class TrainedModel:
    """
    What is trained, without what it is trained on.

    Args:
        source ([`SourcePipeline`]): The pipeline, with the denoiser.
        intervals ([`NoiseIntervals`], *optional*): Of the experts.
        model (`nn.Module`), recipe ([`TrainingRecipe`]): As the method has prepared them.
    """

    source: SourcePipeline
    intervals: NoiseIntervals | None
    model: nn.Module
    recipe: TrainingRecipe


def prepare_model(args: TextToImageArguments, frozen_dtype: torch.dtype) -> TrainedModel:
    """
    Load what is trained, as the method prepares it; the noise process in `args` becomes the pipeline's.

    Args:
        args ([`TextToImageArguments`]): For the pipeline, the method, and what samples need.
        frozen_dtype (`torch.dtype`): Of weights that are not trained.

    Raises:
        ValueError: if the arguments do not fit the pipeline.
    """
    method = METHODS[args.method]
    source = SourcePipeline(str(args.pretrained_model_name_or_path))
    args.resolve_process(source.scheduler)
    intervals, needed = None, None
    if method.has_experts:
        intervals = args.intervals(source.scheduler)
        source.check_boundaries(intervals)
        if args.single_expert is not None and not args.sample_steps:
            needed = intervals.edges[args.single_expert], intervals.edges[args.single_expert + 1]
    else:
        source.expect_one_denoiser(args.method)
    source.load(torch.float32 if method.trains_weights else frozen_dtype, bool(args.sample_steps), needed)
    source.called.requires_grad_(method.trains_weights)
    set_seed(args.seed)  # for the first weights of adapters
    model, recipe = method.prepare(args, source, intervals)
    return TrainedModel(source=source, intervals=intervals, model=model, recipe=recipe)


def make_text_objective(args: TextToImageArguments, source: SourcePipeline) -> Objective:
    """
    The loss of a pipeline's denoiser, in the noise process that the pipeline was made for.

    Args:
        args ([`TextToImageArguments`]): For the weighting and, for flow matching, density and shift.
        source ([`SourcePipeline`]): The pipeline.
    """
    scheduler = source.scheduler
    if args.objective != "flow":
        # its samples are x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·ε, whatever the pipeline's own scheduler makes of them
        process: Any = DDPMScheduler.from_config(scheduler.config)
        return DiffusionObjective(process, args.weighting, None, args.uncertainty_learning_rate)
    return make_flow_objective(args, scheduler, source.family.token_size(source.denoiser.config))
