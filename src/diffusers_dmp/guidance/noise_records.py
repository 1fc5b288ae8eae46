"""What guidance experts record about noise: the process that they were trained on, and who owns which timesteps of it."""

from typing import Any

from ..diffusion.process import NoiseProcess
from ..intervals import NoiseIntervals


def read_process(noise_schedule: dict[str, Any] | None, num_train_timesteps: int) -> NoiseProcess | None:
    """
    Read the noise process of experts.

    Args:
        noise_schedule (`dict`, *optional*): The record; see [`GuidanceExperts`]. None if the process is not known.
        num_train_timesteps (`int`): T of the experts.

    Raises:
        ValueError: if it is of another T.
    """
    if noise_schedule is None:
        return None
    process = NoiseProcess.from_record({"num_train_timesteps": num_train_timesteps} | noise_schedule)
    if process.num_train_timesteps != num_train_timesteps:
        raise ValueError(
            f"Expected `noise_schedule` to be one of the experts' {num_train_timesteps} training timesteps, but got "
            f"{process.num_train_timesteps}."
        )
    return process


def read_intervals(edges: list[float] | None, num_experts: int, num_train_timesteps: int) -> NoiseIntervals:
    """
    Read the intervals of experts.

    Args:
        edges (`list[float]` of length E + 1, *optional*): Their edges in timesteps; None for intervals of equal length.
        num_experts (`int`): E.
        num_train_timesteps (`int`): T.

    Raises:
        ValueError: if the edges do not fit E and T.
    """
    if edges is None:
        return NoiseIntervals.uniform(num_experts, num_train_timesteps)
    if len(edges) != num_experts + 1 or edges[-1] != num_train_timesteps:
        raise ValueError(
            f"Expected `interval_edges` to be {num_experts + 1} numbers from 0 to {num_train_timesteps}, for "
            f"{num_experts} experts, but got {list(edges)}."
        )
    return NoiseIntervals(tuple(edges))
