"""Which timesteps a batch trains on."""

import torch

from ...intervals import NoiseIntervals


def balanced_timesteps(
    intervals: NoiseIntervals, batch_size: int, generator: torch.Generator | None = None
) -> torch.LongTensor:
    """
    Timesteps of which every interval has the same share, uniform inside it (ANT, https://arxiv.org/abs/2306.00354).

    One interval over all timesteps is plain uniform sampling. Neighbours in the batch belong to different intervals,
    so that equal slices of it are balanced as well.

    Args:
        intervals (`NoiseIntervals`): E intervals.
        batch_size (`int`): B, divisible by E.
        generator (`torch.Generator`, *optional*): Its device is the result's.

    Returns:
        `torch.LongTensor` of shape (B,), in integer steps.

    Raises:
        ValueError: if B is not divisible by E.
    """
    if batch_size % intervals.num_experts:
        raise ValueError(
            f"Expected `batch_size` to be divisible by the {intervals.num_experts} timestep clusters, but got {batch_size}."
        )
    device = generator.device if generator is not None else None
    experts = torch.arange(batch_size, device=device) % intervals.num_experts
    return intervals.sample(experts, batch_size, generator)


def expert_timesteps(
    intervals: NoiseIntervals, experts: list[int], batch_size: int, generator: torch.Generator
) -> torch.LongTensor:
    """
    Timesteps of one expert in each of several equal stretches of the batch, uniform inside its interval: one expert for
    each process (Remix-DiT, https://arxiv.org/abs/2412.05628).

    Args:
        intervals (`NoiseIntervals`): E intervals.
        experts (`list[int]` of length P): In [0, E).
        batch_size (`int`): B, divisible by P.
        generator (`torch.Generator`): Its device is the result's.

    Returns:
        `torch.LongTensor` of shape (B,), in integer steps.
    """
    owners = torch.tensor(experts).repeat_interleave(batch_size // len(experts))
    return intervals.sample(owners, batch_size, generator)
