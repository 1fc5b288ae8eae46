"""Noise intervals: which expert is responsible for which noise levels. START HERE.

Every system of this package divides the noise levels of a diffusion model into intervals, and gives each interval to an
expert: a set of channels (DTR), a mixture of weights (Remix-DiT), a whole denoiser (SNR split), an adapter of the model that
guides (PPAP). `NoiseIntervals` is the only place where a noise level becomes an expert, for training and for inference:

    >>> intervals = NoiseIntervals((0, 250, 600, 1000))          # three experts, T = 1000 training timesteps
    >>> intervals.index(torch.tensor([0, 249, 250, 599.5, 1000]))  # which expert denoises at these timesteps?
    tensor([0, 0, 1, 1, 2])
    >>> intervals.sample(1, batch_size=4)                         # timesteps to train expert 1 with
    tensor([583, 311, 250, 402])

The rule: expert e owns the timesteps `edges[e] <= t < edges[e + 1]`. A noise level is always written as a training timestep t
in [0, T]: small t is little noise (high signal-to-noise ratio, SNR), large t is much noise. For flow matching, t = σ·T.

Legend: T training timesteps, E experts, B batch.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .diffusion.noise import is_flow_matching, signal_to_noise_ratio
from .diffusion.timesteps import check_timesteps, check_train_timesteps


@dataclass(frozen=True)
class NoiseIntervals:
    """
    Divide the training timesteps [0, T) into E half-open intervals, one for each expert.

    Expert `e` owns `edges[e] <= t < edges[e + 1]`; expert 0 owns the least noise. A timestep may be a float, as
    second-order and flow-matching schedulers have them. A flow-matching scheduler starts at exactly t = T: this one
    timestep belongs to the last expert as well.

    Args:
        edges (`tuple[float, ...]` of length E + 1):
            Where the intervals begin and end, in timesteps: ascending, from 0 to T.

    Raises:
        ValueError: if `edges` do not ascend from 0 to a whole number.
    """

    edges: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "edges", tuple(self.edges))
        ascending = all(low < high for low, high in zip(self.edges, self.edges[1:]))
        if len(self.edges) < 2 or self.edges[0] != 0 or not ascending:
            raise ValueError(f"Expected `edges` to ascend strictly from 0, but got {self.edges}.")
        if self.edges[-1] != int(self.edges[-1]):
            raise ValueError(f"Expected the last of `edges` to be a whole number of timesteps, but got {self.edges}.")

    @classmethod
    def uniform(
        cls, num_experts: int, num_train_timesteps: int = 1000, last_takes_rest: bool = False
    ) -> "NoiseIntervals":
        """
        Make intervals of equal length, [⌊e·T/E⌋, ⌊(e+1)·T/E⌋) (PPAP, https://arxiv.org/abs/2212.05973).

        Args:
            num_experts (`int`): E.
            num_train_timesteps (`int`): T.
            last_takes_rest (`bool`): What to do if T is not divisible by E. False: lengths differ by at most one
                timestep. True: every interval has ⌊T/E⌋ timesteps, and the last one also has the rest (Remix-DiT,
                https://arxiv.org/abs/2412.05628).

        Raises:
            ValueError: if `num_experts` is less than 1 or greater than T.
        """
        if not 1 <= num_experts <= num_train_timesteps:
            raise ValueError(
                f"Expected `num_experts` to be between 1 and the {num_train_timesteps} training timesteps, "
                f"but got {num_experts}."
            )
        if last_takes_rest:
            # expert(t) = min(⌊t / ⌊T/E⌋⌋, E - 1)
            length = num_train_timesteps // num_experts
            return cls((*(e * length for e in range(num_experts)), num_train_timesteps))
        return cls(tuple(e * num_train_timesteps // num_experts for e in range(num_experts + 1)))

    @classmethod
    def from_timesteps(cls, boundaries: Sequence[float], num_train_timesteps: int = 1000) -> "NoiseIntervals":
        """
        Make intervals from the training timesteps between them.

        Args:
            boundaries (`list[float]` of length E - 1): Timesteps, ascending, inside (0, T). Each belongs to the interval that
                it begins.
            num_train_timesteps (`int`): T.

        Raises:
            ValueError: if the boundaries are outside (0, T) or do not ascend.
        """
        boundaries = tuple(boundaries)
        _check_ascending("boundaries", boundaries, num_train_timesteps)
        return cls((0, *boundaries, num_train_timesteps))

    @classmethod
    def from_sigmas(cls, sigmas: Sequence[float], num_train_timesteps: int = 1000) -> "NoiseIntervals":
        """
        Make intervals from the flow-matching noise levels between them, x_t = (1-σ)·x0 + σ·ε with t = σ·T.

        `from_sigmas([0.875])` makes the two intervals of Wan2.2, whose `boundary_ratio` is this σ. A scheduler's shift changes
        which σ are visited, never who owns them.

        Args:
            sigmas (`list[float]` of length E - 1): σ, ascending, inside (0, 1).
            num_train_timesteps (`int`): T.

        Raises:
            ValueError: if the boundaries are outside (0, 1) or do not ascend.
        """
        sigmas = tuple(sigmas)
        _check_ascending("sigmas", sigmas, 1)
        # without the last digits, which a product of decimal numbers does not have: 0.07 · 1000 = 70.00000000000001
        return cls.from_timesteps([round(sigma * num_train_timesteps, 9) for sigma in sigmas], num_train_timesteps)

    @classmethod
    def from_snr(cls, boundaries: Sequence[float], scheduler: SchedulerMixin) -> "NoiseIntervals":
        """
        Make intervals from the signal-to-noise ratios between them (Patch Diffusion, https://arxiv.org/abs/2207.04316).

        Expert e owns s_e >= SNR > s_{e+1}, with s_0 = ∞, s_E = 0 and the boundaries s_1, …, s_{E-1} between them.

        Args:
            boundaries (`list[float]` of length E - 1): Signal-to-noise ratios ᾱ/(1-ᾱ), positive, in descending order.
            scheduler ([`SchedulerMixin`]): A scheduler with `alphas_cumprod` ᾱ, or a flow-matching one
                (x_t = (1-σ)·x0 + σ·ε, whose timestep is σ·T).

        Raises:
            ValueError: if the boundaries are not positive or not descending, if an expert would own no timestep, or if
                the scheduler's timesteps have no signal-to-noise ratio.
        """
        boundaries = tuple(boundaries)
        descending = all(high > low for high, low in zip(boundaries, boundaries[1:]))
        if not descending or any(boundary <= 0 for boundary in boundaries):
            raise ValueError(f"Expected `boundaries` to be positive and to descend, but got {boundaries}.")

        num_train_timesteps = scheduler.config.get("num_train_timesteps")
        inner: list[float]
        if is_flow_matching(scheduler):
            # SNR(t) = ((1 - σ) / σ)² > s  ⇔  t = σ·T < T / (1 + √s)
            inner = [num_train_timesteps / (1 + math.sqrt(boundary)) for boundary in boundaries]
        else:
            _check_has_levels(scheduler)
            # SNR(t) falls with t: the edge is the number of timesteps whose SNR is above the boundary
            snr = signal_to_noise_ratio(scheduler.alphas_cumprod.double())
            inner = [int((snr > boundary).sum()) for boundary in boundaries]
        edges = (0, *inner, num_train_timesteps)
        if any(low >= high for low, high in zip(edges, edges[1:])):
            raise ValueError(
                f"Expected every SNR interval of `boundaries` {boundaries} to contain a timestep of the scheduler, "
                f"but got the timestep edges {edges}."
            )
        return cls(edges)

    def snr_boundaries(self, scheduler: SchedulerMixin) -> list[float]:
        """
        Return the signal-to-noise ratios between the intervals, from which [`~NoiseIntervals.from_snr`] makes them again.

        Args:
            scheduler ([`SchedulerMixin`]): See [`~NoiseIntervals.from_snr`]. Of one with `alphas_cumprod`, which has whole
                timesteps only, the ratio at the first that an expert owns.

        Returns:
            `list[float]` of length E - 1: in descending order.

        Raises:
            ValueError: if the scheduler has another number of training timesteps or none with such a ratio, or an expert owns no
                whole timestep of it.
        """
        self.check_scheduler(scheduler)
        if is_flow_matching(scheduler):
            # SNR(t) = ((1 - σ) / σ)², t = σ·T
            return [(self.num_train_timesteps / edge - 1) ** 2 for edge in self.edges[1:-1]]
        _check_has_levels(scheduler)
        self._check_whole_timesteps()
        snr = signal_to_noise_ratio(scheduler.alphas_cumprod.double())
        return [float(snr[math.ceil(edge)]) for edge in self.edges[1:-1]]

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return len(self.edges) - 1

    @property
    def num_train_timesteps(self) -> int:
        """The number of training timesteps T."""
        return int(self.edges[-1])

    def index(self, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Find the expert that owns each timestep.

        Args:
            timesteps (`torch.Tensor` of any shape): Integer or float timesteps, in [0, T].

        Returns:
            `torch.LongTensor` of the same shape, on the same device: experts in [0, E).

        Raises:
            ValueError: if a timestep on the CPU lies outside (see [`check_timesteps`]).
        """
        check_timesteps(timesteps, self.num_train_timesteps)
        if timesteps.is_floating_point() and timesteps.dtype != torch.float64:
            timesteps = timesteps.float()  # edges such as 999 do not exist in half precision
        inner_edges = _edges_on(self.edges, timesteps.dtype, timesteps.device)[1:-1]
        return torch.bucketize(timesteps, inner_edges, right=True)

    def sample(
        self,
        expert: int | torch.Tensor,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """
        Sample integer training timesteps uniformly from the interval of an expert.

        Args:
            expert (`int` or `torch.LongTensor` of shape (B,)): One expert for the batch, or one for each sample.
            batch_size (`int`): B.
            generator (`torch.Generator`, *optional*): The random generator, on `device`.
            device (*optional*): The device of the result; by default that of the generator, or else the CPU.

        Returns:
            `torch.LongTensor` of shape (B,), with `index(result) == expert`.

        Raises:
            ValueError: if `expert` is out of range, or an interval contains no integer timestep.
        """
        device = torch.device(device or (generator.device if generator is not None else "cpu"))
        self._check_whole_timesteps()
        experts = torch.as_tensor(expert)
        # to read experts that are on an accelerator would make the CPU wait for it
        if experts.is_cpu and experts.numel() and (experts.min() < 0 or experts.max() >= self.num_experts):
            raise ValueError(f"Expected `expert` to be in [0, {self.num_experts}), but got {experts.tolist()}.")
        # but a copy to the CPU has to be waited for
        experts = experts.to(device, non_blocking=device.type != "cpu").expand(batch_size)
        edges = _edges_on(self.edges, torch.long, device)
        low, high = edges[experts], edges[experts + 1]  # (B,)
        fraction = torch.rand(batch_size, generator=generator, device=device)
        # rounding may lift fraction·(high - low) to high - low
        return torch.minimum(low + (fraction * (high - low)).long(), high - 1)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """
        Check that a scheduler was made for the same number of training timesteps as these intervals.

        Raises:
            ValueError: if the numbers differ.
        """
        check_train_timesteps(scheduler, self.num_train_timesteps)

    def _check_whole_timesteps(self) -> None:
        if not all(math.ceil(low) < math.ceil(high) for low, high in zip(self.edges, self.edges[1:])):
            raise ValueError(
                f"Expected every interval to contain an integer timestep, but got the edges {self.edges}."
            )

    def to_config(self) -> list[float]:
        """Return the edges as JSON can store them; `NoiseIntervals(config)` is the inverse."""
        return list(self.edges)


def _check_ascending(name: str, boundaries: tuple[float, ...], end: float) -> None:
    ascending = all(low < high for low, high in zip((0, *boundaries), (*boundaries, end)))
    if not ascending:
        raise ValueError(f"Expected `{name}` to ascend strictly between 0 and {end}, but got {list(boundaries)}.")


def _check_has_levels(scheduler: SchedulerMixin) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "Expected `scheduler` to have `alphas_cumprod` or to be a flow-matching one, "
            f"but got {type(scheduler).__name__}, whose timesteps have no SNR of their own."
        )


@functools.lru_cache(maxsize=64)
def _edges_on(edges: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The edges as a tensor. Cached, because each copy to an accelerator makes the CPU wait for it."""
    if not dtype.is_floating_point:
        edges = tuple(math.ceil(edge) for edge in edges)  # for an integer t: t >= edge ⇔ t >= ⌈edge⌉
    return torch.tensor(edges, dtype=dtype, device=device)


def group_by_expert(experts: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
    """
    Sort the samples of a batch so that those of one expert stand next to each other.

    Args:
        experts (`torch.LongTensor` of shape (B,)): The expert of each sample, on the CPU (elsewhere the CPU waits).

    Returns:
        The order of the samples (B,), which keeps the order within an expert and whose `argsort()` is the inverse; the
        experts that occur, ascending; the number of samples of each of them.
    """
    sorted_experts, order = experts.sort(stable=True)
    present, sizes = sorted_experts.unique_consecutive(return_counts=True)
    return order, present.tolist(), sizes.tolist()
