"""The shift of flow matching: how much further a training, or a sampling, moves towards the noise.
https://arxiv.org/abs/2403.03206 (SD3), section 5.3.2

An image of more pixels keeps its large shapes in more noise. So it is shifted further, by a number or by its resolution.

Legend: C channels, F frames, H and W height and width.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

BY_RESOLUTION = "resolution"


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Shift noise levels as a scheduler does: σ' = s·σ / (1 + (s-1)·σ) (SD3, equation 23). The inverse is the shift 1/s.

    Args:
        sigma (`torch.Tensor` of any shape): σ in [0, 1].
        shift (`float`): s.
    """
    # with 1 + (s-1)·σ = s·σ + 1-σ, no rounding leads out of [0, 1]
    return shift * sigma / (shift * sigma + (1 - sigma))


@dataclass(frozen=True, kw_only=True)
class ResolutionShift:
    """
    The shift of a `FlowMatchEulerDiscreteScheduler` with `use_dynamic_shifting`: the more tokens, the more noise.

    Args:
        base_image_seq_len, max_image_seq_len (`int`), base_shift, max_shift (`float`): μ is linear in the number of tokens,
            `base_shift` at `base_image_seq_len` and `max_shift` at `max_image_seq_len`.
        time_shift_type (`str`): 'exponential' for the shift exp(μ), 'linear' for μ.
        patch_size (`int`): Side of the squares of (latent) pixels that become tokens.
    """

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
    time_shift_type: str = "exponential"
    patch_size: int = 2

    @classmethod
    def of_scheduler(cls, scheduler: Any, patch_size: int) -> "ResolutionShift":
        """Make it of a scheduler's configuration, which may lack some of the settings."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift", "time_shift_type")
        settings = {name: scheduler.config.get(name) for name in names}
        return cls(**{name: value for name, value in settings.items() if value is not None}, patch_size=patch_size)

    def __call__(self, sample_shape: tuple[int, ...]) -> float:
        """
        Compute the shift s of samples of one shape.

        Args:
            sample_shape (`tuple[int, ...]`): (C, H, W) or (C, F, H, W), without the batch.
        """
        return self._shift(self.mu(sample_shape))

    def mu(self, sample_shape: tuple[int, ...]) -> float:
        """
        Compute what the scheduler's `set_timesteps` is given as `mu` for samples of one shape.

        Args:
            sample_shape (`tuple[int, ...]`): (C, H, W) or (C, F, H, W), without the batch.
        """
        *frames, height, width = sample_shape[1:]
        num_tokens = math.prod(frames) * (height // self.patch_size) * (width // self.patch_size)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (num_tokens - self.base_image_seq_len)

    @property
    def range(self) -> tuple[float, float]:
        """The shifts of `base_image_seq_len` and `max_image_seq_len` tokens."""
        return self._shift(self.base_shift), self._shift(self.max_shift)

    def _shift(self, mu: float) -> float:
        return math.exp(mu) if self.time_shift_type == "exponential" else mu


def shift_of(scheduler: Any) -> "float | str":
    """
    Return the shift that a flow-matching scheduler samples with: a number, or 'resolution'.

    Args:
        scheduler ([`SchedulerMixin`]): One whose configuration has `shift` or `flow_shift`, or neither.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        return BY_RESOLUTION
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def parsed_shift(shift: "str | float") -> "float | str":
    """
    Read a shift as a user writes it: a number, or 'resolution'.

    Raises:
        ValueError: if it is neither.
    """
    if shift == BY_RESOLUTION:
        return BY_RESOLUTION
    try:
        number = float(shift)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"Expected `shift` to be a positive number or {BY_RESOLUTION!r}, but got {shift!r}.")
    return number
