"""The figure of a diagnosis: how well each expert denoises at each noise level.

Legend: E experts, K bands of timesteps.
"""

from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .axes import interval_labels

if TYPE_CHECKING:
    from ..evaluation.diagnostics import Diagnosis


def diagnosis_figure(diagnosis: "Diagnosis") -> Figure:
    """
    Plot a diagnosis in three panels.

    Left: the loss of each expert in each band of timesteps, divided by the loss of the best expert there. Middle: the loss in
    each expert's interval if another expert takes its place, divided by the owner's loss. Right: each expert's share of the
    sampling steps and of the training samples. If the experts are LoRAs, the last row on the left and the last column in the
    middle are those of the denoiser without them.

    Args:
        diagnosis ([`Diagnosis`]): As [`diagnose`] returns it.
    """
    bands, swaps = torch.tensor(diagnosis.band_losses), torch.tensor(diagnosis.swap_losses)  # (E, K), (E, E)
    num_experts = len(swaps)
    names = [str(expert) for expert in range(num_experts)]
    if diagnosis.base_losses is not None:
        bands = torch.cat([bands, torch.tensor([diagnosis.base_band_losses])])  # (E + 1, K)
        swaps = torch.cat([swaps, torch.tensor([diagnosis.base_losses]).T], dim=1)  # (E, E + 1)
        names.append("none")
    figure = Figure(figsize=(13, 3 + 0.5 * num_experts), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 0.8))
    by_band = bands / bands.min(0).values
    _show_ratios(left, by_band, "loss divided by the best expert's")
    left.set_xticks(range(by_band.shape[1]), [f"{low:g}" for low in diagnosis.bands[:-1]])
    left.set_xlabel("first timestep of the band")
    left.set_ylabel("expert")
    left.set_yticks(range(len(names)), names)
    _show_ratios(middle, swaps / swaps.diagonal()[:, None], "loss divided by the owner's")
    middle.set_xticks(range(len(names)), names)
    middle.set_xlabel("expert that denoises")
    middle.set_ylabel("interval of expert")
    shares = {"sampling steps": diagnosis.sampling_steps, "training samples": diagnosis.training_samples}
    for index, (name, counts) in enumerate(shares.items()):
        if counts is not None:
            places = torch.arange(num_experts) + 0.35 * index
            right.barh(places, torch.tensor(counts) / max(sum(counts), 1), height=0.35, label=name)
    right.set_yticks(range(num_experts), interval_labels(diagnosis.edges))
    right.invert_yaxis()
    right.set_xlabel("share")
    right.legend()
    return figure


def _show_ratios(axes: Axes, ratios: torch.Tensor, title: str) -> None:
    axes.imshow(ratios.log2(), cmap="Blues", aspect="auto", vmin=0, vmax=2)
    for (row, column), ratio in zip(torch.cartesian_prod(*map(torch.arange, ratios.shape)).tolist(), ratios.flatten()):
        axes.text(column, row, f"{ratio:.2f}", ha="center", va="center", color="w" if ratio > 2 else "k")
    axes.set_yticks(range(len(ratios)))
    axes.set_title(title)
