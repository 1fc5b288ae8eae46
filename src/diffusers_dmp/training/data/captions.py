"""Captions of a data set's images, checked as a whole."""

import datasets

from .listing import shorten


def captions_of(dataset: datasets.Dataset, column: str, source: str) -> list[str]:
    """
    Return the caption of each image; an empty one is allowed, and means the empty prompt.

    Args:
        dataset (`datasets.Dataset`): As [`load_images`] returns it.
        column (`str`): The column of captions.
        source (`str`): Where it is from, for the error.

    Raises:
        ValueError: if a caption is missing, or something else than text.
    """
    feature = dataset.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"Expected `text_column` to be a column of text, but got {feature} for {column!r} in {source!r}."
        )
    captions = list(dataset[column])
    missing = [f"row {row}" for row, caption in enumerate(captions) if caption is None]
    if missing:
        raise ValueError(
            f"Expected {source!r} to have a caption for each image in {column!r}, but got none for {len(missing)} of "
            f"{len(captions)}: {shorten(missing)}. An empty text stands for the empty prompt."
        )
    return captions
