"""Sizes that images of different aspect ratios are resized to, so that a batch has one shape and little is cut off.

As in NovelAI's and SDXL's trainings (https://arxiv.org/abs/2307.01952, section 2.3): all sizes have about as many pixels.
"""

import math

Size = tuple[int, int]  # height and width in pixels

STEPS = 16  # sides differ by about this fraction of `resolution`: 64 pixels of 1024


def aspect_ratio_buckets(resolution: int, multiple: int) -> list[Size]:
    """
    Return the sizes of at most, and about, resolution² pixels, from tall to wide; aspect ratios go up to 4.

    The shorter side is between `resolution` / 2 and `resolution`, the other one as long as possible.

    Args:
        resolution (`int`): The side of the square among them, divisible by `multiple`.
        multiple (`int`): The number of pixels by which all sides are divisible.
    """
    step = multiple * max(1, round(resolution / STEPS / multiple))
    shorter = range(resolution, (resolution - 1) // 2, -step)
    pairs = [(side, resolution + (resolution**2 // side - resolution) // step * step) for side in shorter]
    return sorted({*pairs, *(pair[::-1] for pair in pairs)}, key=lambda size: size[1] / size[0])


def nearest_bucket(height: int, width: int, buckets: list[Size]) -> Size:
    """
    Return the bucket whose aspect ratio is nearest to that of an image; of equally near ones the first.

    Args:
        height (`int`), width (`int`): Of the image, in pixels.
        buckets (`list[tuple[int, int]]`): Heights and widths.
    """
    return min(buckets, key=lambda size: abs(math.log(size[1] * height / (size[0] * width))))
