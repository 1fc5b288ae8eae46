"""Pictures of what the models draw and of how their parts share the noise levels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .diffusion.noise import signal_to_noise_ratio
from .evaluation.costs import gigaflops
from .guidance import GuidanceExperts
from .intervals import NoiseIntervals
from .models import DTRTransformer2DModel, RemixDiTModel
from .models.inputs import class_count
from .pipelines import ClassConditionalPipeline, SNRSplitPipeline

if TYPE_CHECKING:
    from .evaluation.diagnostics import Diagnosis


def sample_grid(columns: "list[list[Image.Image]]", pixel_size: int = 1, gap: int = 1) -> Image.Image:
    """
    Images in a grid, one list per column (per class, say), enlarged so that each pixel is a square of `pixel_size`.
    """
    width, height = columns[0][0].size
    width, height, gap = width * pixel_size, height * pixel_size, gap * pixel_size
    rows = max(len(column) for column in columns)
    grid = Image.new(columns[0][0].mode, (len(columns) * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (gap + x * (width + gap), gap + y * (height + gap)))
    return grid


def comparison_figure(grids: dict[str, Image.Image]) -> Figure:
    """Pictures of one size side by side, each under its name."""
    width, height = next(iter(grids.values())).size
    figure = Figure(figsize=(len(grids) * width / 100 + 0.2, height / 100 + 0.5), layout="constrained")
    for axes, (name, grid) in zip(figure.subplots(1, len(grids), squeeze=False).flat, grids.items()):
        axes.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


def specialisation_figures(
    pipeline: "ClassConditionalPipeline | SNRSplitPipeline",
    timestep: int | None = None,
    num_inference_steps: int = 50,
    training_summary: dict | None = None,
) -> dict[str, Figure]:
    """
    How the parts of a pipeline share the noise levels, whichever of this package's systems it is of.

    Args:
        pipeline: Loaded or trained.
        timestep (`int`, *optional*): One to mark.
        num_inference_steps (`int`): Of the sampling whose steps are counted.
        training_summary (`dict`, *optional*): What `training_summary.json` holds, to compare with the beginning of the training.

    Returns:
        `dict[str, Figure]`: By names for files, the main one first; none for a model of one part.
    """
    model = pipeline.denoisers[0]
    if isinstance(pipeline, SNRSplitPipeline):
        return {"snr_split": snr_split_figure(pipeline, num_inference_steps, timestep)}
    if pipeline.prompt_patch is not None and pipeline.prompt_patch.config.gate != "none":
        timesteps = torch.arange(0, pipeline.scheduler.config.num_train_timesteps, 25)
        gates = pipeline.prompt_patch.gate_weights(timesteps)
        return {"gates": gate_figure(gates, timesteps, timestep), "prompt_usage": prompt_usage_figure(gates)}
    if isinstance(model, DTRTransformer2DModel):
        return {"routing": routing_figure(model, timestep)}
    if isinstance(model, RemixDiTModel):
        edges = model.intervals.edges
        coefficients = model.mixing_coefficients.tolist()
        if training_summary is None:
            return {"mixing": mixing_figure({"mixing coefficients": coefficients}, edges, timestep)}
        before = training_summary["before"]["mixing_coefficients"]
        coefficients = {"before training": before, "after training": coefficients}
        return {
            "mixing": mixing_figure(coefficients, edges, timestep),
            "training_share": training_share_figure(training_summary["samples_per_expert"], edges),
        }
    return {}


def routing_figure(model: DTRTransformer2DModel, timestep: int | None = None) -> Figure:
    """
    The channels that each timestep of a DTR model activates (the paper's figure 3; https://arxiv.org/abs/2310.07138).

    Args:
        model ([`DTRTransformer2DModel`]): Whose blocks are routed alike.
        timestep (`int`, *optional*): One to mark.
    """
    masks = model.task_routing.masks().cpu().numpy()  # (T, D)
    num_train_timesteps, dim = masks.shape
    share = masks.mean(1).mean()

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        masks.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(0, num_train_timesteps, 0, dim),
        cmap=colormaps["Blues"].resampled(4),
        vmin=-0.5,
        vmax=1.5,
    )
    axes.set_xlabel("timestep (0 almost clean, right almost pure noise)")
    axes.set_ylabel("channel")
    axes.set_title(f"Channels that a timestep uses (dark): {share:.0%} of {dim}, the same in every block")
    _mark(axes, timestep)
    return figure


def mixing_figure(
    coefficients: "dict[str, Sequence[Sequence[float]]]", edges: "Sequence[float]", timestep: int | None = None
) -> Figure:
    """
    The mixing coefficients of a Remix-DiT (https://arxiv.org/abs/2412.05628), in one panel or more.

    Args:
        coefficients (each of shape (E, K), by title): `model.mixing_coefficients.tolist()`, or as in `training_summary.json`.
        edges (of length E + 1): `model.intervals.edges`.
        timestep (`int`, *optional*): One whose expert to mark.
    """
    first = next(iter(coefficients.values()))
    num_experts, num_bases = len(first), len(first[0])
    figure = Figure(figsize=(3 + 0.6 * len(coefficients) * num_bases, 1.5 + 0.4 * num_experts), layout="constrained")
    panels = figure.subplots(1, len(coefficients), sharey=True, squeeze=False).flat
    for axes, (title, rows) in zip(panels, coefficients.items()):
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for expert, row in enumerate(rows):
            for basis, share in enumerate(row):
                axes.text(basis, expert, f"{share:.2f}", ha="center", va="center", color="w" if share > 0.6 else "k")
        axes.set_xticks(range(num_bases), [f"basis {basis}" for basis in range(num_bases)])
        axes.set_title(title)
        if timestep is not None:
            owner = int(NoiseIntervals(tuple(edges)).index(torch.tensor(timestep)))
            axes.add_patch(Rectangle((-0.5, owner - 0.5), num_bases, 1, fill=False, edgecolor="tab:red", linewidth=2))
    figure.axes[0].set_yticks(range(num_experts), _stretches(edges))
    figure.axes[0].set_ylabel("expert, by its timesteps (0 almost clean)")
    figure.colorbar(image, ax=figure.axes, label="share in the expert's weights")
    return figure


def training_share_figure(samples_per_expert: "Sequence[int]", edges: "Sequence[float]") -> Figure:
    """
    How much of the training each expert had, as `samples_per_expert` in `training_summary.json` counts it.

    Args:
        samples_per_expert (of length E): Samples that were drawn from the expert's timesteps.
        edges (of length E + 1): `model.intervals.edges`.
    """
    total = sum(samples_per_expert)
    figure = Figure(figsize=(6, 1.5 + 0.35 * len(samples_per_expert)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(samples_per_expert)), [samples / total for samples in samples_per_expert])
    axes.bar_label(bars, [f"{samples / total:.1%}" for samples in samples_per_expert], label_type="center", color="w")
    axes.axvline(1 / len(samples_per_expert), color="gray", linestyle="--", label="equal shares")
    axes.set_yticks(range(len(samples_per_expert)), _stretches(edges))
    axes.invert_yaxis()
    axes.set_ylabel("expert, by its timesteps (0 almost clean)")
    axes.set_xlabel(f"share of the {total:,} samples trained on")
    figure.legend(loc="outside upper right")
    return figure


def gate_figure(gates: torch.Tensor, timesteps: torch.Tensor, timestep: int | None = None) -> Figure:
    """
    What each block of a patched transformer gets of each of its prompts, over the timesteps
    (https://arxiv.org/abs/2405.17825).

    Args:
        gates (`torch.Tensor` of shape (S, L, M)): `patch.gate_weights(timesteps)`.
        timesteps (`torch.Tensor` of shape (S,)): Ascending.
        timestep (`int`, *optional*): One to mark.
    """
    num_blocks, num_prompts = gates.shape[1:]
    relative = (gates * num_prompts).permute(1, 2, 0).cpu().numpy()  # (L, M, S), 1 for an equal share
    columns = min(num_blocks, 6)
    rows = -(-num_blocks // columns)
    figure = Figure(figsize=(1.5 + 1.9 * columns, 1 + 1.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    largest = max(abs(relative - 1).max(), 1e-6)
    for block, axes in enumerate(panels):
        if block >= num_blocks:
            axes.set_axis_off()
            continue
        image = axes.imshow(
            relative[block],
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(float(timesteps[0]), float(timesteps[-1]), -0.5, num_prompts - 0.5),
            cmap="RdBu_r",
            vmin=1 - largest,
            vmax=1 + largest,
        )
        axes.set_title(f"block {block}")
        _mark(axes, timestep)
    figure.supxlabel("timestep (0 almost clean, right almost pure noise)")
    figure.supylabel("prompt")
    figure.colorbar(image, ax=figure.axes, label="weight (1: an equal share)")
    return figure


def prompt_usage_figure(gates: torch.Tensor) -> Figure:
    """
    How much each prompt of a patch is used, on average over timesteps and blocks, and at which extremes of both.

    Args:
        gates (`torch.Tensor` of shape (S, L, M)): `patch.gate_weights(timesteps)`.
    """
    num_prompts = gates.shape[-1]
    gates = gates.cpu()
    order = gates.mean((0, 1)).argsort(descending=True)
    usage = gates.mean((0, 1))[order] * num_prompts
    least, most = gates.amin((0, 1))[order] * num_prompts, gates.amax((0, 1))[order] * num_prompts

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(num_prompts), usage, color="tab:blue", label="mean over timesteps and blocks")
    axes.vlines(range(num_prompts), least, most, color="k", linewidth=1, label="least and most")
    axes.axhline(1, color="gray", linestyle="--", label="equal shares")
    if num_prompts <= 32:
        axes.set_xticks(range(num_prompts), order.tolist())
    axes.set_xlabel("prompt, the most used first")
    axes.set_ylabel("weight (1: an equal share)")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def snr_split_figure(pipeline: SNRSplitPipeline, num_inference_steps: int = 50, timestep: int | None = None) -> Figure:
    """
    Which denoiser owns which timesteps, over the signal-to-noise ratio, and what each of its steps costs an image, without
    guidance (https://arxiv.org/abs/2207.04316).

    Args:
        pipeline ([`SNRSplitPipeline`]): With a scheduler that has `alphas_cumprod`.
        num_inference_steps (`int`): Of the sampling that is counted.
        timestep (`int`, *optional*): One to mark.
    """
    snr = signal_to_noise_ratio(pipeline.scheduler.alphas_cumprod)
    edges = pipeline.intervals().edges
    steps = pipeline.steps_per_denoiser(num_inference_steps)
    costs = [_step_gigaflops(denoiser) for denoiser in pipeline.denoisers]
    sizes = [denoiser.num_parameters() for denoiser in pipeline.denoisers]

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    curve, cost = figure.subplots(1, 2, width_ratios=(2, 1))
    curve.plot(snr, color="k")
    for index, (low, high) in enumerate(zip(edges, edges[1:])):
        name = f"denoiser {index} ({type(pipeline.denoisers[index]).__name__})"
        curve.axvspan(low, high, color=f"C{index}", alpha=0.3, label=f"{name}: {steps[index]} of {sum(steps)} steps")
    for boundary in pipeline.config.snr_boundaries:
        curve.axhline(boundary, color="gray", linestyle="--")
    _mark(curve, timestep)
    curve.set_yscale("log")
    curve.set_xlabel("timestep (0 almost clean, right almost pure noise)")
    curve.set_ylabel("signal-to-noise ratio")
    bars = cost.bar(range(len(costs)), costs, color=[f"C{index}" for index in range(len(costs))])
    cost.bar_label(bars, [f"{flops:.3g}\n{size / 1e6:.1f} M\nparameters" for flops, size in zip(costs, sizes)])
    cost.set_xticks(range(len(costs)), [f"denoiser {index}" for index in range(len(costs))])
    cost.set_ylabel("GFLOPs of a step")
    cost.margins(y=0.35)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def experts_figure(experts: GuidanceExperts, scheduler: SchedulerMixin, timestep: int | None = None) -> Figure:
    """
    Which of PPAP's experts guides at which timesteps, over how much of the image there is in x_t
    (https://arxiv.org/abs/2212.05973).

    Args:
        experts ([`GuidanceExperts`]): Of as many timesteps as the scheduler.
        scheduler ([`SchedulerMixin`]): With `alphas_cumprod`.
        timestep (`int`, *optional*): One to mark.
    """
    edges = experts.intervals.edges
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(scheduler.alphas_cumprod, color="k")
    for expert, (low, high) in enumerate(zip(edges, edges[1:])):
        axes.axvspan(low, high, color=f"C{expert}", alpha=0.3)
        axes.text((low + high) / 2, 1.08, f"expert {expert}", ha="center", va="center")
    _mark(axes, timestep)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("timestep (0 almost clean, right almost pure noise)")
    axes.set_ylabel("share of the image in the noisy one, ᾱ")
    axes.set_title("Which expert of the vision model guides")
    return figure


def diagnosis_figure(diagnosis: "Diagnosis") -> Figure:
    """
    What each expert is good at: left its loss in each band of timesteps over the best expert's there, right over the owner's if it
    took another one's place; below how often each is at work.
    """
    bands, swaps = torch.tensor(diagnosis.band_losses), torch.tensor(diagnosis.swap_losses)
    num_experts = len(swaps)
    figure = Figure(figsize=(13, 3 + 0.5 * num_experts), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 0.8))
    by_band = bands / bands.min(0).values
    _ratios(left, by_band, "loss over the best expert's")
    left.set_xticks(range(by_band.shape[1]), [f"{low:g}" for low in diagnosis.bands[:-1]])
    left.set_xlabel("band, from the timestep")
    left.set_ylabel("expert")
    _ratios(middle, swaps / swaps.diagonal()[:, None], "loss over the owner's")
    middle.set_xlabel("expert that takes its place")
    middle.set_ylabel("stretch of expert")
    shares = {"sampling steps": diagnosis.sampling_steps, "training samples": diagnosis.training_samples}
    for index, (name, counts) in enumerate(shares.items()):
        if counts is not None:
            places = torch.arange(num_experts) + 0.35 * index
            right.barh(places, torch.tensor(counts) / max(sum(counts), 1), height=0.35, label=name)
    right.set_yticks(range(num_experts), _stretches(diagnosis.stretches))
    right.invert_yaxis()
    right.set_xlabel("share")
    right.legend()
    return figure


def _ratios(axes: Axes, ratios: torch.Tensor, title: str) -> None:
    axes.imshow(ratios.log2(), cmap="Blues", aspect="auto", vmin=0, vmax=2)
    for (row, column), ratio in zip(torch.cartesian_prod(*map(torch.arange, ratios.shape)).tolist(), ratios.flatten()):
        axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", color="w" if ratio > 2 else "k")
    axes.set_yticks(range(len(ratios)))
    axes.set_title(title)


def _mark(axes: Axes, timestep: int | None) -> None:
    if timestep is not None:
        axes.axvline(timestep, color="tab:red", linewidth=2)


def _step_gigaflops(denoiser: ModelMixin) -> float:
    """For one image without guidance."""
    config, device = denoiser.config, denoiser.device
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    sample = torch.zeros(1, config.in_channels, height, width, device=device, dtype=denoiser.dtype)
    labels = (
        {}
        if class_count(denoiser.config) is None
        else {"class_labels": torch.zeros(1, dtype=torch.long, device=device)}
    )
    return gigaflops(denoiser, sample, torch.zeros(1, dtype=torch.long, device=device), **labels)


def _stretches(edges: "Sequence[float]") -> list[str]:
    return [f"{expert}: {low:g}–{high - 1:g}" for expert, (low, high) in enumerate(zip(edges, edges[1:]))]
