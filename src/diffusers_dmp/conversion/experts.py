"""Export of a Remix-DiT's experts as stock Diffusers models, usable without this package."""

import json
import os
from pathlib import Path

from ..models.remix_dit import RemixDiTModel


def to_diffusers_experts(model: RemixDiTModel, folder: "str | os.PathLike", approximate: bool = False) -> list[Path]:
    """
    Save every expert as a [`DiTTransformer2DModel`] of Diffusers, in `expert_0`, `expert_1`, … of a folder.

    `experts.json` beside them holds the `edges` of the experts' intervals (expert i owns the timesteps from `edges[i]` to
    below `edges[i + 1]`), and the model's `downscale_freq_shift`, which has to be set after loading an approximate export
    (see [`DiTModel.to_diffusers`]).

    Args:
        model ([`RemixDiTModel`]): The model.
        folder (`str` or `os.PathLike`): Where to write.
        approximate (`bool`): Whether to export a model with the published semantics; see [`DiTModel.to_diffusers`].

    Returns:
        `list[Path]`: The experts' folders.

    Raises:
        ValueError: if the semantics are not the stock ones and `approximate` is False.
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
