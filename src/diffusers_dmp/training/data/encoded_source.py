"""Shards of encoded images and captions: loaded, and compared with one another and with a pipeline.

Legend: N images.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import hf_hub_download

from ...saving.reading import read_json
from ...saving.weight_files import read_safetensors
from ..arguments import LoopArguments
from ..text_pipelines import text_pipeline_of
from .encoded_rows import CAPTION, HEIGHT, PROMPT, WIDTH, Columns, read_rows
from .encoding_record import COMPONENTS, EMPTY_PROMPT_NAME, ENCODING_NAME, check_components
from .identity import digest
from .images import LATENTS
from .listing import shorten
from .sources import open_source

# entries of a denoiser's configuration that are the width of the prompt's tokens, in the order in which they decide
TEXT_WIDTHS = ("joint_attention_dim", "caption_channels", "text_dim", "cap_feat_dim", "cross_attention_dim")


@dataclass(kw_only=True)
class Encoded:
    """
    Encoded images and captions, as `encode_prompts.py` wrote them.

    Args:
        source (`str`): The folder or Hub id that they are from.
        rows (`datasets.Dataset`): With the columns of `encoded_rows.py`.
        encoding (`dict[str, Any]`): The record of what encoded them.
        empty_prompt (`dict[str, torch.Tensor]`): The columns of the empty prompt, each of shape (1, …).
    """

    source: str
    rows: datasets.Dataset
    encoding: dict[str, Any]
    empty_prompt: Columns
    buckets: np.ndarray = field(init=False)  # (N,), the number of each row's size
    sizes: list[tuple[int, int]] = field(init=False)  # heights and widths, by that number

    def __post_init__(self):
        pairs = np.stack([np.asarray(self.rows[name][:], np.int64) for name in (HEIGHT, WIDTH)], axis=1)
        sizes, buckets = np.unique(pairs, axis=0, return_inverse=True)
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self.buckets = buckets.reshape(-1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def samples(self) -> datasets.Dataset:
        """The same rows with tensors as items; see [`read_rows`]."""
        return self.rows.select_columns([LATENTS, PROMPT]).with_transform(read_rows)

    def identity(self) -> dict[str, Any]:
        """What identifies them, wherever they lie."""
        components = self.encoding[COMPONENTS]
        return {
            "images": len(self),
            "captions": digest(self.rows[CAPTION]),
            "sizes": [f"{height} x {width}" for height, width in self.sizes],
            "dtype": self.encoding["dtype"],
            "pipeline": self.encoding["pipeline_class"],
            "encoders": {name: record.get("weights") for name, record in components.items() if "weights" in record},
        }

    def describe(self) -> str:
        """What they are in a few words."""
        counts = np.bincount(self.buckets)
        sizes = [f"{height} x {width} ({count})" for (height, width), count in zip(self.sizes, counts)]
        mirrored = ", with mirror images" if self.encoding["mirror"] else ""
        return f"{len(self)} images with captions{mirrored}, encoded for {self.encoding['pipeline_class']}: {shorten(sizes)}"


def load_encoded(source: str, split: str = "train") -> Encoded:
    """
    Load what `encode_prompts.py` wrote.

    Args:
        source (`str`): Its folder, or the id of a data set on the Hub.
        split (`str`): The split to load.

    Raises:
        ValueError: if it is something else, or not whole.
    """
    source = os.path.expanduser(source)
    encoding, empty_prompt = read_encoding(source)
    rows = open_source(source, split)
    if len(rows) != encoding["num_images"] and split == "train":
        raise ValueError(
            f"Expected {source!r} to hold the {encoding['num_images']} images of its {ENCODING_NAME}, but got {len(rows)}; run "
            "encode_prompts.py again, which goes on with the missing shards."
        )
    return Encoded(source=source, rows=rows, encoding=encoding, empty_prompt=empty_prompt)


def read_encoding(source: str) -> tuple[dict[str, Any], Columns]:
    """
    Read what stands beside shards that `encode_prompts.py` wrote: the record of what encoded them, and the empty prompt.

    Args:
        source (`str`): Their folder, or the id of a data set on the Hub.

    Returns:
        The record, and the columns of the empty prompt, each of shape (1, …).

    Raises:
        ValueError: if there is none.
    """
    if not source:
        raise ValueError(
            "Expected `dataset` to be a folder that encode_prompts.py wrote, or a Hub id, but got nothing."
        )
    encoding = read_json(_file_beside(source, ENCODING_NAME))
    if COMPONENTS not in encoding:
        raise ValueError(
            f"Expected {source!r} to be encoded by encode_prompts.py, with captions, but its {ENCODING_NAME} is of latents alone."
        )
    return encoding, read_safetensors(_file_beside(source, EMPTY_PROMPT_NAME))


def check_encodings_agree(training: Encoded, validation: Encoded) -> None:
    """
    Check that held-out data have the encoding of the training data.

    Raises:
        ValueError: if not; what differs is named.
    """
    for name in ("pipeline_class", "dtype"):
        wanted, got = (each.encoding[name] for each in (training, validation))
        if wanted != got:
            raise ValueError(
                f"Expected `validation_dataset` to have the {name} of `dataset`, {wanted}, but got {got} in {validation.source!r}."
            )
    check_components(training.encoding[COMPONENTS], validation.encoding[COMPONENTS], validation.source)


def check_mirror_images(encoding: dict[str, Any], args: LoopArguments) -> None:
    """
    Check that training data have the mirror images that `random_flip` needs.

    Args:
        encoding (`dict[str, Any]`): Their record.
        args ([`LoopArguments`]): For `random_flip`, and the data's name.

    Raises:
        ValueError: if not.
    """
    if args.random_flip and not encoding["mirror"]:
        raise ValueError(
            f"Expected `random_flip` to be false for {args.dataset!r}, which was encoded without mirror images, but got true; "
            "encode_prompts.py writes them with `--mirror true`."
        )


def check_shapes(encoded: Encoded, pipeline: Any) -> None:
    """
    Check that a pipeline's denoiser takes latents and prompts of these widths.

    Raises:
        ValueError: if not.
    """
    text_pipeline = text_pipeline_of(pipeline)
    denoisers = (getattr(pipeline, name, None) for name in text_pipeline.components)
    config = next(denoiser for denoiser in denoisers if denoiser is not None).config
    sample = encoded.samples[0]
    channels = sample["mean"].shape[1]
    taken = config.get("in_channels")
    if taken is not None and taken not in (channels, channels * text_pipeline.packed_size**2):
        raise ValueError(
            f"Expected the latents in {encoded.source!r} to have the channels that this pipeline's denoiser takes, {taken}, but got "
            f"{channels}."
        )
    width = next((config[name] for name in TEXT_WIDTHS if config.get(name)), None)
    embeds = sample.get("prompt_embeds")
    if isinstance(width, int) and embeds is not None and embeds.shape[-1] != width:
        raise ValueError(
            f"Expected the prompts in {encoded.source!r} to be {width} wide, as this pipeline's denoiser takes them, but got "
            f"{embeds.shape[-1]}."
        )


def _file_beside(source: str, name: str) -> Path:
    """A file beside shards, in a folder or on the Hub."""
    path = Path(source, name)
    if os.path.isdir(source) and path.is_file():
        return path
    if not os.path.exists(source):
        try:
            return Path(hf_hub_download(source, name, repo_type="dataset"))
        except (OSError, ValueError) as error:  # of the Hub's client, too
            raise ValueError(
                f"Expected {source!r} to be a folder that encode_prompts.py wrote, or such a data set on the Hub, but got: {error}"
            ) from error
    raise ValueError(f"Expected {source!r} to be a folder that encode_prompts.py wrote, but it has no {name}.")
