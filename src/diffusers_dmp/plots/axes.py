"""Labels and marks that several figures share."""

from collections.abc import Sequence

from matplotlib.axes import Axes

TIMESTEP_LABEL = "timestep (0: almost clean, right: almost pure noise)"
EXPERT_LABEL = "expert and its timesteps (0: almost clean)"


def mark_timestep(axes: Axes, timestep: int | None) -> None:
    """Mark a timestep by a vertical line, if one is given."""
    if timestep is not None:
        axes.axvline(timestep, color="tab:red", linewidth=2)


def interval_labels(edges: Sequence[float]) -> list[str]:
    """
    Name each expert with the timesteps that it owns, such as '1: 250–499'.

    Args:
        edges (`Sequence[float]` of length E + 1): `NoiseIntervals.edges`.
    """
    return [f"{expert}: {low:g}–{high - 1:g}" for expert, (low, high) in enumerate(zip(edges, edges[1:]))]
