"""The figures of the systems: how channels, weights, prompts, denoisers and guidance experts depend on the timestep.

Legend: D width, E experts, K bases, L blocks, M prompts, S timesteps, T training timesteps.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..diffusion.noise import signal_to_noise_ratio
from ..diffusion.process import NoiseProcess
from ..evaluation.costs import gigaflops
from ..intervals import NoiseIntervals
from ..models.inputs import class_count
from .axes import EXPERT_LABEL, TIMESTEP_LABEL, interval_labels, mark_timestep

if TYPE_CHECKING:
    from ..guidance import GuidanceExperts
    from ..models import DTRTransformer2DModel
    from ..pipelines import SNRSplitPipeline


def routing_figure(model: "DTRTransformer2DModel", timestep: int | None = None) -> Figure:
    """
    Plot the channels that each timestep of a DTR model activates (https://arxiv.org/abs/2310.07138, figure 3).

    Args:
        model ([`DTRTransformer2DModel`]): The model; all its blocks use the same channels.
        timestep (`int`, *optional*): A timestep to mark, in [0, T).
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
    axes.set_xlabel(TIMESTEP_LABEL)
    axes.set_ylabel("channel")
    axes.set_title(f"Active channels (dark) of each timestep: {share:.0%} of {dim}, the same in every block")
    mark_timestep(axes, timestep)
    return figure


def mixing_figure(
    coefficients: Mapping[str, Sequence[Sequence[float]]], edges: Sequence[float], timestep: int | None = None
) -> Figure:
    """
    Plot the mixing coefficients of a Remix-DiT (https://arxiv.org/abs/2412.05628), one panel for each entry.

    Args:
        coefficients (each of shape (E, K), by title): `model.mixing_coefficients.tolist()`, or as in `training_summary.json`.
        edges (`Sequence[float]` of length E + 1): `model.intervals.edges`, in timesteps.
        timestep (`int`, *optional*): A timestep whose expert is marked, in [0, T).
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
    figure.axes[0].set_yticks(range(num_experts), interval_labels(edges))
    figure.axes[0].set_ylabel(EXPERT_LABEL)
    figure.colorbar(image, ax=figure.axes, label="share of the expert's weights")
    return figure


def training_share_figure(samples_per_expert: Sequence[int], edges: Sequence[float]) -> Figure:
    """
    Plot how much each expert was trained.

    Args:
        samples_per_expert (`Sequence[int]` of length E): The number of training samples with a timestep of the expert, as
            `training_summary.json` counts it.
        edges (`Sequence[float]` of length E + 1): `model.intervals.edges`, in timesteps.
    """
    total = sum(samples_per_expert)
    figure = Figure(figsize=(6, 1.5 + 0.35 * len(samples_per_expert)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(samples_per_expert)), [samples / total for samples in samples_per_expert])
    axes.bar_label(bars, [f"{samples / total:.1%}" for samples in samples_per_expert], label_type="center", color="w")
    axes.axvline(1 / len(samples_per_expert), color="gray", linestyle="--", label="equal shares")
    axes.set_yticks(range(len(samples_per_expert)), interval_labels(edges))
    axes.invert_yaxis()
    axes.set_ylabel(EXPERT_LABEL)
    axes.set_xlabel(f"share of the {total:,} training samples")
    figure.legend(loc="outside upper right")
    return figure


def gate_figure(gates: torch.Tensor, timesteps: torch.Tensor, timestep: int | None = None) -> Figure:
    """
    Plot the weight of each prompt in each block of a transformer with prompts, over the timesteps
    (https://arxiv.org/abs/2405.17825).

    Args:
        gates (`torch.Tensor` of shape (S, L, M)): `PromptPatch.gate_weights(timesteps)`.
        timesteps (`torch.Tensor` of shape (S,)): The timesteps, ascending.
        timestep (`int`, *optional*): A timestep to mark, in [0, T).
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
        mark_timestep(axes, timestep)
    figure.supxlabel(TIMESTEP_LABEL)
    figure.supylabel("prompt")
    figure.colorbar(image, ax=figure.axes, label="weight (1: equal shares)")
    return figure


def prompt_usage_figure(gates: torch.Tensor) -> Figure:
    """
    Plot how much each prompt is used: its mean, smallest and largest weight over timesteps and blocks.

    Args:
        gates (`torch.Tensor` of shape (S, L, M)): `PromptPatch.gate_weights(timesteps)`.
    """
    num_prompts = gates.shape[-1]
    gates = gates.cpu()
    order = gates.mean((0, 1)).argsort(descending=True)
    usage = gates.mean((0, 1))[order] * num_prompts
    least, most = gates.amin((0, 1))[order] * num_prompts, gates.amax((0, 1))[order] * num_prompts

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(num_prompts), usage, color="tab:blue", label="mean over timesteps and blocks")
    axes.vlines(range(num_prompts), least, most, color="k", linewidth=1, label="smallest and largest")
    axes.axhline(1, color="gray", linestyle="--", label="equal shares")
    if num_prompts <= 32:
        axes.set_xticks(range(num_prompts), order.tolist())
    axes.set_xlabel("prompt (the most used first)")
    axes.set_ylabel("weight (1: equal shares)")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def snr_split_figure(
    pipeline: "SNRSplitPipeline", num_inference_steps: int = 50, timestep: int | None = None
) -> Figure:
    """
    Plot which denoiser owns which timesteps, with their signal-to-noise ratios, and the cost of a denoising step of one image
    without guidance (https://arxiv.org/abs/2207.04316).

    Args:
        pipeline ([`SNRSplitPipeline`]): A pipeline whose scheduler has `alphas_cumprod`.
        num_inference_steps (`int`): The length of the sampling whose steps are counted.
        timestep (`int`, *optional*): A timestep to mark, in [0, T).
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
    mark_timestep(curve, timestep)
    curve.set_yscale("log")
    curve.set_xlabel(TIMESTEP_LABEL)
    curve.set_ylabel("signal-to-noise ratio")
    bars = cost.bar(range(len(costs)), costs, color=[f"C{index}" for index in range(len(costs))])
    cost.bar_label(bars, [f"{flops:.3g}\n{size / 1e6:.1f} M\nparameters" for flops, size in zip(costs, sizes)])
    cost.set_xticks(range(len(costs)), [f"denoiser {index}" for index in range(len(costs))])
    cost.set_ylabel("GFLOPs per step")
    cost.margins(y=0.35)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def experts_figure(experts: "GuidanceExperts", scheduler: SchedulerMixin, timestep: int | None = None) -> Figure:
    """
    Plot which guidance expert owns which timesteps, with the share of the image in x_t (https://arxiv.org/abs/2212.05973).

    The timesteps are those of the noise that the experts were trained on.

    Args:
        experts ([`GuidanceExperts`]): The experts.
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler, or one with `alphas_cumprod`: the noise of experts that do not
            know theirs.
        timestep (`int`, *optional*): A timestep of the scheduler to mark, in [0, T).
    """
    edges = experts.intervals.edges
    given = NoiseProcess(scheduler)
    process = given if experts.process is None or experts.process.is_process_of(scheduler) else experts.process
    alphas, sigmas = process.levels_at(torch.arange(process.num_train_timesteps))
    if timestep is not None and process is not given:
        timestep = round(float(process.timestep_at(*given.levels_at(torch.tensor(timestep)))))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(alphas**2 / (alphas**2 + sigmas**2), color="k")
    for expert, (low, high) in enumerate(zip(edges, edges[1:])):
        axes.axvspan(low, high, color=f"C{expert}", alpha=0.3)
        axes.text((low + high) / 2, 1.08, f"expert {expert}", ha="center", va="center")
    mark_timestep(axes, timestep)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.15)
    axes.set_xlabel(TIMESTEP_LABEL)
    axes.set_ylabel("share of the image in the noisy image, ᾱ")
    axes.set_title("The guidance expert of each timestep")
    return figure


def _step_gigaflops(denoiser: ModelMixin) -> float:
    """The cost of a denoising step of one image without guidance, in GFLOPs."""
    config, device = denoiser.config, denoiser.device
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    sample = torch.zeros(1, config.in_channels, height, width, device=device, dtype=denoiser.dtype)
    zero = torch.zeros(1, dtype=torch.long, device=device)  # the timestep, and a class
    labels = {} if class_count(config) is None else {"class_labels": zero}
    return gigaflops(denoiser, sample, zero, **labels)
