"""Choose the sampling timesteps as the published results did.

iDDPM: https://arxiv.org/abs/2102.09672, DDIM: https://arxiv.org/abs/2010.02502.
"""


def respaced_timesteps(num_train_timesteps: int, respacing: int | str | list[int]) -> list[int]:
    """
    Return the timesteps to pass to a pipeline as `timesteps`.

    Args:
        num_train_timesteps (`int`): T.
        respacing (`int`, `str` or `list[int]`): `250` or '250' for that many timesteps, evenly from the first to the
            last; '10,15,20' or `[10, 15, 20]` for that many in each of as many sections of equal length; 'ddim50' for the
            fixed stride of the DDIM paper.

    Returns:
        `list[int]`: descending.

    Raises:
        ValueError: if there are fewer timesteps than asked for, or no integer stride gives that many.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        return _with_fixed_stride(num_train_timesteps, respacing)
    if isinstance(respacing, str):
        counts = [int(count) for count in respacing.split(",")]
    else:
        counts = [respacing] if isinstance(respacing, int) else list(respacing)

    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        # if T is not divisible, the first sections are longer by one
        length = num_train_timesteps // len(counts) + (section < num_train_timesteps % len(counts))
        if not 1 <= count <= length:
            raise ValueError(
                f"Expected `respacing` to take 1 to {length} timesteps of section {section}, but got {count}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        timesteps += [start + round(position * stride) for position in range(count)]
        start += length
    return timesteps[::-1]


def _with_fixed_stride(num_train_timesteps: int, respacing: str) -> list[int]:
    """The timesteps 0, s, 2s, … for the smallest stride s that gives as many as `respacing` says ('ddim50')."""
    count = int(respacing.removeprefix("ddim"))
    for stride in range(1, num_train_timesteps):
        timesteps = range(0, num_train_timesteps, stride)
        if len(timesteps) == count:
            return list(reversed(timesteps))
    raise ValueError(
        f"Expected `respacing` to have an integer stride through {num_train_timesteps}, but got {respacing!r}."
    )
