"""Read images from a file, a folder or the Hub as uint8 arrays, in batches.

Legend: N images, H and W height and width, C channels.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..training.data.decoding import BACKGROUND, check_background, open_image
from ..training.data.images import describe_images, load_images
from ..training.data.scan import readable_images
from ..training.data.workers import num_threads
from .npz import NpzImages


class DatasetImages:
    """
    The images of a data set.

    Args:
        source (`str`): A folder, a parquet file or a Hub id; see [`load_images`]. All images below a folder count, whatever
            its sub-folders.
        split (`str`): Which split of the data set.
        image_column (`str`): The column of images.
        background (`str`): The colour behind transparent pixels.

    Raises:
        ValueError: if the data set has no such column.
    """

    def __init__(self, source: str, split: str = "train", image_column: str = "image", background: str = BACKGROUND):
        check_background(background)
        self.source, self.image_column, self.background = source, image_column, background
        self.dataset = load_images(source, image_column, split, label_column=None)
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
            ValueError: if the sizes differ, or if an image cannot be read; see [`open_image`].
        """
        size = None
        with ThreadPoolExecutor(num_threads()) as threads:
            for batch in self.dataset.select_columns([self.image_column]).iter(batch_size):
                images = list(threads.map(self._open, batch[self.image_column]))
                size = size or images[0].size
                for encoded, image in zip(batch[self.image_column], images):
                    if image.size != size:
                        raise ValueError(
                            f"Expected the images of {self.source!r} to be of one size, but got {size[0]} x {size[1]} and "
                            f"{image.width} x {image.height} pixels ({encoded['path'] or 'without a name'})."
                        )
                yield np.stack([np.asarray(image) for image in images])

    def _open(self, encoded: dict[str, Any]) -> PIL.Image.Image:
        return open_image(encoded, 3, self.background)


def read_ahead(batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """
    Yield batches, and read the next one meanwhile.

    Args:
        batches (of `np.ndarray`): The batches; an error in reading one is raised in its place.
    """
    following = iter(batches)
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(next, following, None)
        while (batch := reading.result()) is not None:
            reading = reader.submit(next, following, None)
            yield batch


def open_images(
    source: "str | os.PathLike",
    split: str = "train",
    image_column: str = "image",
    background: str = BACKGROUND,
    skip_unreadable: bool = False,
) -> "NpzImages | DatasetImages":
    """
    Open images of any supported source, check that they can be read, and print how many there are.

    Args:
        source: An `.npz` file (see [`NpzImages`]), or what [`load_images`] accepts: a folder of images or of parquet files, one
            parquet file, or the id of a data set on the Hub.
        split (`str`), image_column (`str`), background (`str`): Of a data set; see [`DatasetImages`].
        skip_unreadable (`bool`): Go on without the images that cannot be read, and list them.

    Returns:
        An object with `len(images)` and `images.batches(batch_size)`.

    Raises:
        ValueError: if there are no images at `source`, or one that cannot be read.
    """
    if str(source).endswith(".npz"):
        if not Path(source).is_file():
            raise ValueError(f"Expected {str(source)!r} to be a file, but there is none.")
        return NpzImages(source)
    images = DatasetImages(str(source), split, image_column, background)
    images.dataset = readable_images(images.dataset, image_column, skip_unreadable, source=str(source))
    print(f"{source}: {describe_images(images.dataset, label_column=None)}", file=sys.stderr)
    return images
