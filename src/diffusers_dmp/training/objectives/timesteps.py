"""The timesteps that a batch trains on, and the experts that they belong to."""

from dataclasses import dataclass

import numpy as np
import torch

from ...intervals import NoiseIntervals


@dataclass(frozen=True)
class StepExperts:
    """
    The experts that one optimiser step trains.

    Args:
        intervals ([`NoiseIntervals`]): The intervals of all experts.
        owners (`list[int]` of length P): The expert of each of P equal slices of the batch: as many as processes, each of which
            then trains one expert, or as many as samples.
    """

    intervals: NoiseIntervals
    owners: list[int]


def random_experts(seed: int, step: int, num_experts: int, num_processes: int) -> list[int]:
    """One random expert for each process, as a function of (seed, step) alone; on the CPU, where models need to know it."""
    return np.random.default_rng([seed, step]).integers(num_experts, size=num_processes).tolist()


def balanced_experts(step: int, num_experts: int, batch_size: int) -> list[int]:
    """
    One expert for each sample of a batch, all equally often; where the batch does not divide, over several steps.

    Neighbours belong to different experts, so that equal slices of the batch are balanced as well.
    """
    return [(step * batch_size + sample) % num_experts for sample in range(batch_size)]


def evenly_spread(num_experts: int, batch_size: int) -> torch.Tensor:
    """
    One expert for each sample of a batch, all equally often, also in equal slices of it: (B,), on the CPU (ANT,
    https://arxiv.org/abs/2306.00354).

    Raises:
        ValueError: if the batch is not divisible by the number of experts.
    """
    if batch_size % num_experts:
        raise ValueError(
            f"Expected `batch_size` to be divisible by the {num_experts} timestep clusters, but got {batch_size}."
        )
    return torch.arange(batch_size) % num_experts


def owners_of_samples(owners: list[int], batch_size: int) -> torch.Tensor:
    """The expert of each sample, (B,), from those of P equal slices of the batch; on the CPU."""
    return torch.tensor(owners).repeat_interleave(batch_size // len(owners))
