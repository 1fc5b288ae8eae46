"""Read images from a file, a folder or the Hub as uint8 arrays, in batches.

Legend: N images, H and W height and width, C channels.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from ..training.data.images import load_images, open_image
from .npz import NpzImages


class DatasetImages:
    """
    The images of a data set.

    Args:
        source (`str`): A folder, a parquet file or a Hub id; see [`load_images`].
        split (`str`): Which split of the data set.
        image_column (`str`): Which column of the data set.

    Raises:
        ValueError: if the data set has no such column.
    """

    def __init__(self, source: str, split: str = "train", image_column: str = "image"):
        self.source, self.image_column = source, image_column
        self.dataset = load_images(source, image_column, split)
        if image_column not in self.dataset.column_names:
            raise ValueError(f"Expected {source!r} to hold images, but got {self.dataset.column_names}.")

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """
        Yield the images in order, as uint8 arrays of shape (n, H, W, 3); grey images get three equal channels.

        Args:
            batch_size (`int`): n, except in the last batch.

        Raises:
            ValueError: if the sizes differ, or if an image has more than 8 bits per channel or is transparent.
        """
        size = None
        for batch in self.dataset.iter(batch_size):
            images = [self._as_rgb(open_image(encoded)) for encoded in batch[self.image_column]]
            size = size or images[0].size
            for image in images:
                if image.size != size:
                    raise ValueError(
                        f"Expected the images of {self.source!r} to be of one size, but got {size[0]} x {size[1]} and "
                        f"{image.width} x {image.height} pixels."
                    )
            yield np.stack([np.asarray(image) for image in images])

    def _as_rgb(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Convert to RGB; refuse images that the conversion would change."""
        is_opaque = not image.has_transparency_data or image.convert("RGBA").getextrema()[-1] == (255, 255)
        if image.mode.startswith(("I", "F")) or not is_opaque:
            kind = f"of mode {image.mode}" if is_opaque else "with transparency"
            raise ValueError(f"Expected the images of {self.source!r} to be opaque and of 8 bits, but got one {kind}.")
        return image.convert("RGB")


def open_images(
    source: "str | os.PathLike", split: str = "train", image_column: str = "image"
) -> "NpzImages | DatasetImages":
    """
    Open images of any supported source.

    Args:
        source: An `.npz` file (see [`NpzImages`]), or what [`load_images`] accepts: a folder of images or of parquet files, one
            parquet file, or the id of a data set on the Hub.
        split (`str`), image_column (`str`): Which split and column of a data set.

    Returns:
        An object with `len(images)` and `images.batches(batch_size)`.

    Raises:
        ValueError: if there are no images at `source`.
    """
    if str(source).endswith(".npz"):
        if not Path(source).is_file():
            raise ValueError(f"Expected {str(source)!r} to be a file, but there is none.")
        return NpzImages(source)
    return DatasetImages(str(source), split, image_column)
