"""Which expert owns which stretch of noise: the only place where a timestep becomes an expert.

Legend: T counts diffusion timesteps (t = 0 is almost clean, T - 1 almost pure noise), E experts, B the batch.
"""

import functools
import math
from dataclasses import dataclass

import torch

from .diffusion.noise import is_flow_matching, signal_to_noise_ratio


@dataclass(frozen=True)
class NoiseIntervals:
    """
    A partition of the diffusion timesteps [0, T) into E half-open intervals, one per expert.

    Expert `e` owns `edges[e] <= t < edges[e + 1]`. Expert 0 owns the cleanest images (small t, high SNR). A timestep
    may be a float, as second-order and flow-matching schedulers have them; a flow-matching scheduler starts at
    exactly t = T, which belongs to the last expert.

    Args:
        edges (`tuple[float, ...]` of length E + 1):
            Ascending, in timesteps, from 0 to the number of training timesteps T.

    Raises:
        ValueError: if `edges` do not ascend from 0.
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
        Intervals of equal length, [⌊e·T/E⌋, ⌊(e+1)·T/E⌋) (PPAP, https://arxiv.org/abs/2212.05973).

        Args:
            num_experts (`int`): E.
            num_train_timesteps (`int`): T.
            last_takes_rest (`bool`): Where E does not divide T: all intervals have ⌊T/E⌋ timesteps, and the last one the
                rest as well (Remix-DiT, https://arxiv.org/abs/2412.05628).

        Raises:
            ValueError: if there are more experts than timesteps, or none.
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
    def from_snr(cls, boundaries: "list[float] | tuple[float, ...]", scheduler) -> "NoiseIntervals":
        """
        Intervals bounded by signal-to-noise ratios (Patch Diffusion, https://arxiv.org/abs/2207.04316).

        Expert e owns s_e >= SNR > s_{e+1}, where s_0 = ∞, s_E = 0 and the boundaries lie between.

        Args:
            boundaries (`list[float]` of length E - 1): Descending, positive signal-to-noise ratios ᾱ/(1-ᾱ).
            scheduler: A Diffusers scheduler with `alphas_cumprod`, or a flow-matching one (x_t = (1-σ)·x0 + σ·ε, whose
                timestep is σ·T).

        Raises:
            ValueError: if the boundaries do not descend, if an expert would own no timestep of this scheduler's, or if
                the scheduler defines no SNR for a timestep.
        """
        boundaries = tuple(boundaries)
        descending = all(high > low for high, low in zip(boundaries, boundaries[1:]))
        if not descending or any(boundary <= 0 for boundary in boundaries):
            raise ValueError(f"Expected `boundaries` to be positive and to descend, but got {boundaries}.")

        num_train_timesteps = scheduler.config.get("num_train_timesteps")
        if is_flow_matching(scheduler):
            # SNR(t) = ((1 - σ) / σ)² > s  ⇔  t = σ·T < T / (1 + √s)
            inner = [num_train_timesteps / (1 + math.sqrt(boundary)) for boundary in boundaries]
        elif hasattr(scheduler, "alphas_cumprod"):
            # SNR(t) falls with t: the edge is the number of timesteps above the boundary
            snr = signal_to_noise_ratio(scheduler.alphas_cumprod.double())
            inner = [int((snr > boundary).sum()) for boundary in boundaries]
        else:
            raise ValueError(
                "Expected `scheduler` to have `alphas_cumprod` or to be a flow-matching one, "
                f"but got {type(scheduler).__name__}, whose timesteps have no SNR of their own."
            )
        edges = (0, *inner, num_train_timesteps)
        if any(low >= high for low, high in zip(edges, edges[1:])):
            raise ValueError(
                f"Expected every SNR interval of `boundaries` {boundaries} to hold a timestep of the scheduler's, "
                f"but got the timestep edges {edges}."
            )
        return cls(edges)

    @property
    def num_experts(self) -> int:
        return len(self.edges) - 1

    @property
    def num_train_timesteps(self) -> int:
        return int(self.edges[-1])

    def index(self, timesteps: torch.Tensor) -> torch.LongTensor:
        """
        The expert of each timestep.

        Args:
            timesteps (`torch.Tensor` of any shape): Integer or float timesteps, in [0, T].

        Returns:
            `torch.LongTensor` of the same shape, on the same device: experts in [0, E).

        Raises:
            ValueError: if a timestep lies outside the range (see [`check_timesteps`]).
        """
        check_timesteps(timesteps, self.num_train_timesteps)
        if timesteps.is_floating_point():
            timesteps = timesteps.float()
        return torch.bucketize(timesteps, _edges_on(self.edges, timesteps.dtype, timesteps.device)[1:-1], right=True)

    def sample(
        self,
        expert: "int | torch.LongTensor",
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> torch.LongTensor:
        """
        Draw integer training timesteps uniformly from the interval of an expert.

        Args:
            expert (`int` or `torch.LongTensor` of shape (B,)): One expert for the batch, or one for each sample.
            batch_size (`int`): B.
            generator (`torch.Generator`, *optional*): On `device`.
            device (*optional*): Of the result; the generator's by default.

        Returns:
            `torch.LongTensor` of shape (B,), with `index(result) == expert`.

        Raises:
            ValueError: if `expert` is out of range, or its interval holds no integer timestep.
        """
        device = device or (generator.device if generator is not None else "cpu")
        if not all(math.ceil(low) < math.ceil(high) for low, high in zip(self.edges, self.edges[1:])):
            raise ValueError(f"Expected every interval to hold an integer timestep, but got the edges {self.edges}.")
        if not isinstance(expert, torch.Tensor):
            if not 0 <= expert < self.num_experts:
                raise ValueError(f"Expected `expert` to be in [0, {self.num_experts}), but got {expert}.")
            expert = torch.full((batch_size,), int(expert), device=device)
        elif expert.is_cpu and expert.numel() and (expert.min() < 0 or expert.max() >= self.num_experts):
            raise ValueError(f"Expected `expert` to be in [0, {self.num_experts}), but got {expert.tolist()}.")
        expert = expert.to(device, non_blocking=True)
        integer_edges = _edges_on(self.edges, torch.long, torch.device(device))
        low, high = integer_edges[expert], integer_edges[expert + 1]  # (B,)
        fraction = torch.rand(batch_size, generator=generator, device=device)
        # rounding may lift fraction·(high - low) to its upper end
        return torch.minimum(low + (fraction * (high - low)).long(), high - 1)

    def check_scheduler(self, scheduler) -> None:
        """
        Raises:
            ValueError: if the scheduler was made for another number of training timesteps than these intervals.
        """
        check_train_timesteps(scheduler, self.num_train_timesteps)

    def to_config(self) -> list[float]:
        """JSON-serialisable; `NoiseIntervals(config)` is its inverse."""
        return list(self.edges)


@functools.lru_cache(maxsize=64)
def _edges_on(edges: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The edges as a tensor, copied to a device once: each copy would make an accelerator wait for the host."""
    if not dtype.is_floating_point:
        edges = tuple(math.ceil(edge) for edge in edges)  # for an integer t, t >= edge ⇔ t >= ⌈edge⌉
    return torch.tensor(edges, dtype=dtype, device=device)


def check_timesteps(timesteps: torch.Tensor, num_train_timesteps: int) -> None:
    """
    Refuse timesteps outside [0, T), or [0, T] for floats. On an accelerator nothing is read back (it would stall the
    device at every step): the pipelines check their whole schedule once, on the CPU.

    Raises:
        ValueError: if one of the CPU tensor `timesteps` lies outside.
    """
    if not timesteps.is_cpu or torch.compiler.is_compiling() or timesteps.numel() == 0:
        return
    low, high = timesteps.min(), timesteps.max()
    if low < 0 or high > num_train_timesteps or (high == num_train_timesteps and not timesteps.is_floating_point()):
        raise ValueError(
            f"Expected `timestep` to lie within the {num_train_timesteps} training timesteps, "
            f"but got values from {low.item()} to {high.item()}."
        )


def check_train_timesteps(scheduler, num_train_timesteps: int) -> None:
    """
    Raises:
        ValueError: if the scheduler's number of training timesteps is not the model's `num_train_timesteps`.
    """
    scheduler_timesteps = scheduler.config.get("num_train_timesteps")
    if scheduler_timesteps != num_train_timesteps:
        raise ValueError(
            f"Expected the scheduler's `num_train_timesteps` to be the model's {num_train_timesteps}, "
            f"but got a {type(scheduler).__name__} with {scheduler_timesteps}."
        )


def group_by_expert(experts: torch.LongTensor) -> tuple[torch.LongTensor, list[int], list[int]]:
    """
    Put samples of one expert next to each other.

    Args:
        experts (`torch.LongTensor` of shape (B,)): Of each sample, on the CPU (elsewhere the device is waited for).

    Returns:
        The order (B,), stable, whose `argsort()` is the way back; the experts that occur, ascending; how many samples each
        of them has.
    """
    sorted_experts, order = experts.sort(stable=True)
    present, sizes = sorted_experts.unique_consecutive(return_counts=True)
    return order, present.tolist(), sizes.tolist()
