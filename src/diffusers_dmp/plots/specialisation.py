"""How the parts of a pipeline divide the noise levels, in the figures of its system.

Each record in `systems.py` names its function here. All of them take the pipeline, its part that divides the noise levels,
and a [`FigureOptions`], and return figures by their names.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure

from ..systems import systems_in
from . import figures
from .steps import steps_figure

if TYPE_CHECKING:
    from ..guidance import GuidanceExperts
    from ..models import DenoiserExperts, DTRTransformer2DModel, RemixDiTModel
    from ..pipelines import ClassConditionalPipeline, SNRSplitPipeline
    from ..plugins import PromptPatch

GATE_SPACING = 25  # timesteps between those whose gates are plotted
FLUX_MAX_SHIFT = 1.15  # the `mu` of Flux at its largest image


@dataclass(frozen=True)
class FigureOptions:
    """
    What a figure shows besides the pipeline.

    Args:
        timestep (`int`, *optional*): The timestep to mark.
        num_inference_steps (`int`): The length of the sampling whose steps are counted.
        training_summary (`dict`, *optional*): The content of `training_summary.json`.
    """

    timestep: int | None = None
    num_inference_steps: int = 50
    training_summary: dict[str, Any] | None = None


def specialisation_figures(
    pipeline: "ClassConditionalPipeline | SNRSplitPipeline",
    timestep: int | None = None,
    num_inference_steps: int = 50,
    training_summary: dict[str, Any] | None = None,
) -> dict[str, Figure]:
    """
    Plot how the parts of a pipeline divide the noise levels, in the figures of its system.

    Args:
        pipeline: Loaded or trained; guidance experts are found in its [`GuidedScheduler`].
        timestep (`int`, *optional*): A timestep to mark, in [0, T).
        num_inference_steps (`int`): The length of the sampling whose steps are counted.
        training_summary (`dict`, *optional*): The content of `training_summary.json`, to compare with the state before training.

    Returns:
        `dict[str, Figure]`: By names that serve as file names, the main figure first; empty for a model without specialised
        parts.
    """
    system, part = systems_in(pipeline)[0]
    if system.figures is None:
        return {}
    return globals()[system.figures](pipeline, part, FigureOptions(timestep, num_inference_steps, training_summary))


def routing_figures(_: Any, model: "DTRTransformer2DModel", options: FigureOptions) -> dict[str, Figure]:
    """Figures of DTR."""
    return {"routing": figures.routing_figure(model, options.timestep)}


def mixing_figures(_: Any, model: "RemixDiTModel", options: FigureOptions) -> dict[str, Figure]:
    """Figures of Remix-DiT; with a training's summary, its coefficients before and after training and its samples."""
    edges, after = model.intervals.edges, model.mixing_coefficients.tolist()
    summary = options.training_summary
    if summary is None:
        return {"mixing": figures.mixing_figure({"mixing coefficients": after}, edges, options.timestep)}
    before = summary["before"]["mixing_coefficients"]
    panels = {"before training": before, "after training": after}
    return {
        "mixing": figures.mixing_figure(panels, edges, options.timestep),
        "training_share": figures.training_share_figure(summary["samples_per_expert"], edges),
    }


def prompt_figures(
    pipeline: "ClassConditionalPipeline", prompts: "PromptPatch", options: FigureOptions
) -> dict[str, Figure]:
    """Figures of DMP."""
    timesteps = torch.arange(0, pipeline.scheduler.config.num_train_timesteps, GATE_SPACING)
    gates = prompts.gate_weights(timesteps)
    return {
        "gates": figures.gate_figure(gates, timesteps, options.timestep),
        "prompt_usage": figures.prompt_usage_figure(gates),
    }


def snr_split_figures(pipeline: "SNRSplitPipeline", _: Any, options: FigureOptions) -> dict[str, Figure]:
    """Figures of Patch Diffusion and of every other split by signal-to-noise ratios."""
    return {"snr_split": figures.snr_split_figure(pipeline, options.num_inference_steps, options.timestep)}


def guidance_figures(
    pipeline: "ClassConditionalPipeline", experts: "GuidanceExperts", options: FigureOptions
) -> dict[str, Figure]:
    """Figures of PPAP."""
    return {"guidance_experts": figures.experts_figure(experts, pipeline.scheduler, options.timestep)}


def step_figures(pipeline: Any, model: "DenoiserExperts", options: FigureOptions) -> dict[str, Figure]:
    """Figures of whole denoisers as experts."""
    scheduler = pipeline.scheduler
    # the shift depends on the image's size: here, on that of the largest
    largest = scheduler.config.get("max_shift", FLUX_MAX_SHIFT)  # only some schedulers have it in their configuration
    schedule = {"mu": largest} if scheduler.config.get("use_dynamic_shifting") else {}
    figure = steps_figure(
        model.intervals, scheduler, options.num_inference_steps, timestep=options.timestep, **schedule
    )
    return {"steps": figure}
