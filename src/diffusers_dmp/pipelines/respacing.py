"""Fewer sampling timesteps than training ones, the way the published results chose them.
iDDPM: https://arxiv.org/abs/2102.09672, DDIM: https://arxiv.org/abs/2010.02502
"""


def respaced_timesteps(num_train_timesteps: int, respacing: "int | str | list[int]") -> list[int]:
    """
    The timesteps to hand to `pipeline(timesteps=…)`.

    Args:
        num_train_timesteps (`int`): T.
        respacing (`int`, `str` or `list[int]`): `250` or '250' for that many evenly from the first to the last;
            '10,15,20' or `[10, 15, 20]` for that many in each of the equally long sections; 'ddim50' for the fixed stride
            of the DDIM paper.

    Returns:
        `list[int]`: descending.

    Raises:
        ValueError: if there are not so many timesteps, or no integer stride gives so many.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        count = int(respacing.removeprefix("ddim"))
        for stride in range(1, num_train_timesteps):
            timesteps = range(0, num_train_timesteps, stride)
            if len(timesteps) == count:
                return list(reversed(timesteps))
        raise ValueError(
            f"Expected `respacing` to have an integer stride through {num_train_timesteps}, but got {respacing!r}."
        )

    if isinstance(respacing, int):
        respacing = [respacing]
    elif isinstance(respacing, str):
        respacing = respacing.split(",")
    counts = [int(count) for count in respacing]
    timesteps, start = [], 0
    for section, count in enumerate(counts):
        # the first sections take what does not divide evenly
        length = num_train_timesteps // len(counts) + (section < num_train_timesteps % len(counts))
        if not 1 <= count <= length:
            raise ValueError(
                f"Expected `respacing` to take 1 to {length} timesteps of section {section}, but got {count}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        timesteps += [start + round(position * stride) for position in range(count)]
        start += length
    return timesteps[::-1]
