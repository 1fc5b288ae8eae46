"""Images of a shard, encoded as PNG in threads while the accelerator samples the next ones."""

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import PIL.Image

MAX_THREADS = 8
COLOUR_TYPES = {"L": 0, "RGB": 2, "RGBA": 6}  # of PNG, by Pillow's modes of 8 bits
UP = 2  # PNG's filter: the difference from the row above
LEVEL = 1  # of the compression


class EncodedImages:
    """
    A column of images, encoded in threads, in their order.

    ```py
    with EncodedImages() as column:
        column.add(images)
        column.add(more_images)
        datasets.Dataset.from_dict({"image": column.encoded()}, features=…)
    ```

    At most the images of one `add` wait to be encoded.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        self._waiting: list[Future] = []
        self._encoded: list[dict[str, Any]] = []

    def __enter__(self) -> "EncodedImages":
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown(cancel_futures=True)

    def add(self, images: Sequence[PIL.Image.Image]) -> None:
        """Begin to encode images, when those added before are encoded."""
        self.encoded()
        self._waiting = [self._threads.submit(encode, image) for image in images]

    def encoded(self) -> list[dict[str, Any]]:
        """Return all images added so far, as a `datasets.Image` column holds them; an error in a thread is raised here."""
        self._encoded += [each.result() for each in self._waiting]
        self._waiting = []
        return self._encoded


def encode(image: PIL.Image.Image) -> dict[str, Any]:
    """
    Encode an image without loss, as an entry of a `datasets.Image` column.

    Args:
        image (`PIL.Image.Image`): Of 8 bits it becomes a PNG. Pillow, which encodes the others, lets no other thread run meanwhile, and
            takes five times as long for files that are a tenth smaller.
    """
    if image.mode not in COLOUR_TYPES:
        return datasets.Image().encode_example(image)
    return {"bytes": encode_png(np.asarray(image), COLOUR_TYPES[image.mode]), "path": None}


def encode_png(pixels: np.ndarray, colour_type: int) -> bytes:
    """
    Encode pixels as a PNG file (https://www.w3.org/TR/png-3/).

    Args:
        pixels (`np.ndarray` of shape (H, W) or (H, W, C)): uint8.
        colour_type (`int`): PNG's, for C channels.
    """
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    filtered = np.full((height, 1 + rows.shape[1]), UP, np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    # 8 bits, and the only methods that there are of compression and filters; not interlaced
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(filtered.tobytes(), LEVEL), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    )
