"""Figures of what the models generate and of how their parts divide the noise levels."""

from .diagnosis import diagnosis_figure
from .figures import (
    experts_figure,
    gate_figure,
    mixing_figure,
    prompt_usage_figure,
    routing_figure,
    snr_split_figure,
    training_share_figure,
)
from .grids import comparison_figure, sample_grid
from .specialisation import specialisation_figures
from .steps import steps_figure

__all__ = [
    "comparison_figure",
    "diagnosis_figure",
    "experts_figure",
    "gate_figure",
    "mixing_figure",
    "prompt_usage_figure",
    "routing_figure",
    "sample_grid",
    "snr_split_figure",
    "specialisation_figures",
    "steps_figure",
    "training_share_figure",
]
