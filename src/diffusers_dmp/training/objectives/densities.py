"""Densities over the noise levels of flow matching: which σ a training sees how often, as a whole or inside one interval.

Named as in Diffusers' training utilities, from SD3 (https://arxiv.org/abs/2403.03206, section 3.1). With u uniform in [0, 1]:

| name | quantile function σ = Q(u) | source |
| --- | --- | --- |
| `uniform` | u | https://arxiv.org/abs/2210.02747 |
| `logit_normal` | sigmoid(mean + std·Φ⁻¹(u)) | SD3, equation 19 |
| `mode` | u - s·(sin²(πu/2) - u) | SD3, equation 20 |
| `cosmap` | sin(πu/2) / (sin(πu/2) + cos(πu/2)) | SD3, equation 21 |

Then comes the shift s to σ' = s·σ / (1 + (s-1)·σ) (SD3, equation 23). Inside an interval [a, b) with the cumulative
distribution function F = Q⁻¹, a noise level is Q(F(a) + u·(F(b) - F(a))): exactly the density, cut to the interval.

Legend: B batch, E experts, T training timesteps; t = σ·T.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...diffusion.timesteps import SINGLE_PRECISION
from ...intervals import NoiseIntervals
from .shifts import shifted

DENSITIES = ("uniform", "logit_normal", "mode", "cosmap")
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # where the density of `mode` is positive (SD3, below equation 20)

# Between an interval's edges and the noise levels that are trained in it, as a share of T. A denoiser is told the time in
# float32, in a unit of its own, and what it is told is taken for an edge that is as close as `SINGLE_PRECISION`.
_MARGIN = SINGLE_PRECISION + 8 * torch.finfo(torch.float32).eps
# Below this probability float64 has too few numbers between F(a) and F(b); here still 10,000.
MIN_TRUNCATED_SHARE = 1e-12
MIN_SHARE = 1e-4  # of an expert that has to wait for its samples: one in 40 batches of 256


@dataclass(frozen=True, kw_only=True)
class NoiseDensity:
    """
    A density over the noise levels σ in [0, 1] of flow matching.

    Args:
        name (`str`): One of `DENSITIES`.
        logit_mean, logit_std (`float`): Of `logit_normal`. A positive mean is more noise, as in the paper. (Diffusers' training
            scripts count from the noise: their mean has the other sign.)
        mode_scale (`float`): Of `mode`.
        shift (`float`): s; above 1 it is more noise.

    Raises:
        ValueError: if the name is unknown or a number is outside its range.

    Example:
        >>> NoiseDensity(name="logit_normal", shift=5.0).probability(0.875, 1.0)
        0.36822...
    """

    name: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self):
        if self.name not in DENSITIES:
            raise ValueError(f"Expected `density` to be one of {', '.join(DENSITIES)}, but got {self.name!r}.")
        if not math.isfinite(self.logit_mean):
            raise ValueError(f"Expected `logit_mean` to be a finite number, but got {self.logit_mean}.")
        for name in ("logit_std", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected `{name}` to be a positive number, but got {getattr(self, name)}.")
        low, high = MODE_SCALES
        if not low <= self.mode_scale <= high:
            raise ValueError(f"Expected `mode_scale` to be in [{low:g}, {high:.4g}], but got {self.mode_scale}.")

    def quantile(self, share: torch.Tensor) -> torch.Tensor:
        """
        Compute the noise levels below which shares of the probability lie: Q.

        Args:
            share (`torch.Tensor` of any shape): In [0, 1].

        Returns:
            σ in the same shape and dtype.
        """
        if self.name == "logit_normal":
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(share))
        elif self.name == "mode":
            sigma = _mode_quantile(share, self.mode_scale)
        elif self.name == "cosmap":
            angle = math.pi / 2 * share
            sigma = angle.sin() / (angle.sin() + angle.cos())
        else:
            sigma = share
        return shifted(sigma, self.shift)

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        """
        Compute the probability of less noise: F, the inverse of [`~NoiseDensity.quantile`].

        Args:
            sigma (`torch.Tensor` of any shape): σ in [0, 1].

        Returns:
            Shares in [0, 1], of the same shape and dtype.
        """
        sigma = shifted(sigma, 1 / self.shift)
        if self.name == "logit_normal":
            return torch.special.ndtr((torch.logit(sigma) - self.logit_mean) / self.logit_std)
        if self.name == "mode":
            return _mode_cdf(sigma, self.mode_scale)
        if self.name == "cosmap":
            return 2 / math.pi * torch.atan2(sigma, 1 - sigma)
        return sigma

    def probability(self, low: float, high: float) -> float:
        """
        Compute the share of the noise levels that lies in [low, high).

        Args:
            low, high (`float`): σ in [0, 1].
        """
        below, above = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return above - below

    def shares(self, intervals: NoiseIntervals) -> list[float]:
        """
        Compute the share of each expert's interval.

        Args:
            intervals ([`NoiseIntervals`]): E intervals.

        Returns:
            `list[float]` of length E, which add up to 1.
        """
        sigmas = torch.tensor(intervals.edges, dtype=torch.float64) / intervals.num_train_timesteps
        return self.cdf(sigmas).diff().tolist()

    def check_shares(
        self, intervals: NoiseIntervals, experts: Iterable[int] | None = None, min_share: float = MIN_TRUNCATED_SHARE
    ) -> None:
        """
        Check that no expert is left without noise levels to train on.

        Args:
            intervals ([`NoiseIntervals`]): E intervals.
            experts (`Iterable[int]`, *optional*): The experts to check; all by default.
            min_share (`float`): The least share that an interval must have: `MIN_TRUNCATED_SHARE` where an expert has samples of
                its own, `MIN_SHARE` where it gets those that come by the density.

        Raises:
            ValueError: if one has less; expert, interval and share are named.
        """
        total, shares = intervals.num_train_timesteps, self.shares(intervals)
        for expert in range(intervals.num_experts) if experts is None else experts:
            if shares[expert] < min_share:
                low, high = intervals.edges[expert : expert + 2]
                raise ValueError(
                    f"Expected every expert to own at least {min_share:g} of the probability, but got {shares[expert]:.3g} for "
                    f"expert {expert}, σ in [{low / total:.6g}, {high / total:.6g}), by {self}. Move the boundaries, or choose "
                    "another `density` or `shift`."
                )

    def sample(
        self, intervals: NoiseIntervals, owners: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """
        Sample timesteps from the density, truncated to the interval of each sample's owner.

        Args:
            intervals ([`NoiseIntervals`]): E intervals.
            owners (`torch.LongTensor` of shape (B,)): The expert of each sample, in [0, E).
            generator (`torch.Generator`, *optional*): Its device is the result's.

        Returns:
            `torch.Tensor` of shape (B,), float32: t = σ·T, with `intervals.index(result) == owners`, also after any denoiser
            was told it in float32.

        Raises:
            ValueError: if an interval has no probability, or is too short for float32.
        """
        device = torch.device("cpu") if generator is None else generator.device
        starved = _starved_experts(self, intervals)
        if starved and owners.is_cpu:
            self.check_shares(intervals, starved.intersection(owners.tolist()))
        lows, highs, below, above = _truncation(self, intervals, device)
        owners = owners.to(device, non_blocking=True)
        uniform = torch.rand(len(owners), generator=generator, dtype=below.dtype, device=device)
        # Q(F(a) + u·(F(b) - F(a)))
        sigma = self.quantile(torch.lerp(below[owners], above[owners], uniform))
        timesteps = (sigma * intervals.num_train_timesteps).float()
        return timesteps.clamp(lows[owners], highs[owners])  # what rounding moved across an edge

    def __str__(self) -> str:
        numbers = {
            "logit_normal": f", logit_mean {self.logit_mean:g}, logit_std {self.logit_std:g}",
            "mode": f", mode_scale {self.mode_scale:g}",
        }
        return f"the density {self.name}{numbers.get(self.name, '')}, shift {self.shift:g}"


def _mode_quantile(share: torch.Tensor, scale: float) -> torch.Tensor:
    # SD3's 1 - u - s·(cos²(πu/2) - 1 + u) at 1 - u, so that it ascends
    return share - scale * (torch.sin(math.pi / 2 * share).square() - share)


def _mode_cdf(sigma: torch.Tensor, scale: float) -> torch.Tensor:
    """The inverse of an ascending function, by bisection: one more bit of float64 in each round."""
    low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
    for _ in range(64):
        middle = (low + high) / 2
        is_below = _mode_quantile(middle, scale) < sigma
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return high


def owned_timesteps(low: float, high: float, num_train_timesteps: int) -> tuple[float, float]:
    """
    Return the first and last timestep of an interval that are trained: all of it but what rounding may move across an edge.

    Args:
        low, high (`float`): The interval [low, high).
        num_train_timesteps (`int`): T.

    Raises:
        ValueError: if there is none between them.
    """
    margin = _MARGIN * num_train_timesteps
    first = low if low == 0 else low + margin
    last = high if high == num_train_timesteps else high - margin
    if first >= last:
        raise ValueError(
            f"Expected an interval of noise levels to be longer than {2 * margin:.3g} timesteps, but got [{low}, {high})."
        )
    return first, last


@functools.lru_cache(maxsize=256)
def _starved_experts(density: NoiseDensity, intervals: NoiseIntervals) -> frozenset[int]:
    """The experts with less than `MIN_TRUNCATED_SHARE`, which nothing can be sampled for."""
    shares = density.shares(intervals)
    return frozenset(expert for expert, share in enumerate(shares) if share < MIN_TRUNCATED_SHARE)


@functools.lru_cache(maxsize=256)
def _truncation(density: NoiseDensity, intervals: NoiseIntervals, device: torch.device) -> tuple[torch.Tensor, ...]:
    """
    The first and last timestep of each interval that are trained, and F at both: four tensors (E,).

    Cached, because each copy to an accelerator makes the CPU wait for it.
    """
    total = intervals.num_train_timesteps
    bounds = [owned_timesteps(*edges, total) for edges in zip(intervals.edges, intervals.edges[1:])]
    timesteps = torch.tensor(bounds, dtype=torch.float64).T  # (2, E)
    exact_dtype = torch.float32 if device.type == "mps" else torch.float64
    shares = density.cdf(timesteps / total).to(device, exact_dtype)
    return (*timesteps.float().to(device), *shares)
