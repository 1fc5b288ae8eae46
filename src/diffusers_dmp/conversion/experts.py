"""Experts out, as stock Diffusers weights that need nothing of this package."""

import json
import os
from pathlib import Path

from ..models.remix_dit import RemixDiTModel


def to_diffusers_experts(model: RemixDiTModel, folder: "str | os.PathLike", approximate: bool = False) -> list[Path]:
    """
    Save every expert as a [`DiTTransformer2DModel`] of Diffusers', in `expert_0`, `expert_1`, …; and in `experts.json`
    which of them owns which timesteps, expert i those from `edges[i]` to below `edges[i + 1]`, and the model's
    `downscale_freq_shift`, which approximate ones have to be given after loading (see [`DiTModel.to_diffusers`]).

    Args:
        model ([`RemixDiTModel`]): Exact under the stock semantics alone; see [`DiTModel.to_diffusers`].
        folder: Where to write.
        approximate (`bool`): Export a model of other semantics all the same.

    Returns:
        `list[Path]`: the experts' folders.

    Raises:
        ValueError: if the semantics are not the stock ones and `approximate` is not set.
    """
    paths = [Path(folder, f"expert_{expert}") for expert in range(model.config.num_experts)]
    for expert, path in enumerate(paths):
        model.bake_expert(expert).to_diffusers(approximate).save_pretrained(path)
    experts = {
        "folders": [path.name for path in paths],
        "edges": model.intervals.to_config(),
        "downscale_freq_shift": model.config.downscale_freq_shift,
    }
    Path(folder, "experts.json").write_text(json.dumps(experts, indent=2) + "\n")
    return paths
