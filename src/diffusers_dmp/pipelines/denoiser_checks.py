"""Whether several denoisers fit together, and fit the signal-to-noise ratios (SNR) that a pipeline gives them."""

import math
from collections.abc import Sequence

from diffusers.models.modeling_utils import ModelMixin

from ..models.inputs import class_count


def untrained_intervals(denoisers: list[ModelMixin], snr_boundaries: Sequence[float]) -> list[str]:
    """
    Find the denoisers that get signal-to-noise ratios which they were not trained on (`snr_interval` in a configuration).

    Args:
        denoisers (`list[ModelMixin]` of length N): The denoiser for the highest ratios first.
        snr_boundaries (`list[float]` of length N - 1): Descending.

    Returns:
        `list[str]`: a message for each such denoiser.
    """
    problems = []
    bounds = [math.inf, *snr_boundaries, 0.0]
    for index, (denoiser, highest, lowest) in enumerate(zip(denoisers, bounds, bounds[1:])):
        trained = denoiser.config.get("snr_interval") or (None, None)
        trained_highest = math.inf if trained[0] is None else trained[0]
        trained_lowest = 0.0 if trained[1] is None else trained[1]
        if highest > trained_highest or lowest < trained_lowest:
            problems.append(
                f"Expected denoiser {index} to have been trained on the signal-to-noise ratios {highest} to {lowest}, "
                f"but got one for {trained_highest} to {trained_lowest}."
            )
    return problems


def check_denoisers(
    denoisers: list[ModelMixin],
    snr_boundaries: Sequence[float],
    prediction_types: list[str],
    guidance_scales: list[float],
) -> None:
    """
    Check that denoisers fit together.

    Args:
        denoisers (`list[ModelMixin]` of length N): The denoiser for the highest signal-to-noise ratios first.
        snr_boundaries (`list[float]` of length N - 1): Descending.
        prediction_types (`list[str]` of length N): What each denoiser is said to predict.
        guidance_scales (`list[float]` of length N): w of each denoiser.

    Raises:
        ValueError: if a list has another length, a denoiser was trained for another interval or prediction type, or the
            denoisers' channels, sizes or classes differ.
    """
    for name, values in (("prediction_types", prediction_types), ("guidance_scales", guidance_scales)):
        if len(values) != len(denoisers):
            raise ValueError(f"Expected `{name}` to be one for each of {len(denoisers)} denoisers, but got {values}.")
    for problem in untrained_intervals(denoisers, snr_boundaries):
        raise ValueError(problem)
    first = denoisers[0].config
    for index, (denoiser, prediction_type) in enumerate(zip(denoisers, prediction_types)):
        config = denoiser.config
        if config.get("prediction_type") not in (None, prediction_type):
            raise ValueError(
                f"Expected denoiser {index} to be given the prediction type {config.prediction_type!r} that it was "
                f"trained for, but got {prediction_type!r}."
            )
        for name in ("in_channels", "sample_size"):
            if config[name] != first[name]:
                raise ValueError(
                    f"Expected all denoisers to have the `{name}` {first[name]} of the first, "
                    f"but got {config[name]} for denoiser {index}."
                )
        if class_count(config) != class_count(first):
            raise ValueError(
                f"Expected all denoisers to know the {class_count(first)} classes of the first, "
                f"but got {class_count(config)} for denoiser {index}."
            )
