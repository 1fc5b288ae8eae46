"""From images and captions to the rows of shards, by a pipeline's own VAE and text encoders.

Legend: b samples encoded at once, H and W height and width in pixels, M 1, or 2 with the mirror images, C latent channels, F frames
(videos only), h and w those of the latents.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...models.precision import dtype_named
from ..arguments import NumberChecks, SourceArguments, option
from ..interruption import ignore_signals
from ..text_pipelines import TextPipeline
from .buckets import Size, nearest_bucket
from .decoding import BACKGROUND, check_background, open_image
from .encoded_rows import CAPTION, FEATURES, HEIGHT, PROMPT, WIDTH, Columns, to_bytes
from .fitting import crop_to_size, to_tensor
from .images import LATENTS
from .workers import choose_workers, num_bytes_of

MAX_REMEMBERED = 64  # captions of which the columns are kept, for data sets in which they come again


@dataclass(kw_only=True)
class PromptEncodingArguments(SourceArguments, NumberChecks):
    """The images and captions to encode, and how they are encoded."""

    dataset: str = option(
        "",
        "Folder of images, with captions in .txt files beside them or in metadata; parquet folder or file, or Hub id.",
    )
    pipeline: str = option(
        "", "Folder or Hub id of the text-to-image pipeline, of which text encoders and VAE are loaded."
    )
    image_column: str = option("image", "Column of images in the data set.")
    text_column: str = option(
        "text", "Column of captions; in a folder of images that of the metadata, or else .txt files."
    )
    resolution: int = option(512, "Images are scaled and cropped to this many pixels, squared.")
    aspect_ratio_buckets: bool = option(
        False, "Crop each image to the nearest of several aspect ratios, of as many pixels, instead of to a square."
    )
    mirror: bool = option(False, "Encode the mirror images as well, for a training with `random_flip`.")
    background: str = option(BACKGROUND, "Colour behind transparent pixels: a name or #rrggbb.")
    skip_unreadable: bool = option(False, "Leave out the images that cannot be read, and list them.")
    dtype: str = option(
        "float32",
        "What text encoders compute in and shards are stored in: float32, float16 or bfloat16. The VAE computes in float32.",
    )
    batch_size: int = option(8, "Images that a process encodes at once.")
    shard_size: int = option(256, "Images per shard.")
    output_dir: str = option("outputs/encoded", "Where the shards are written; training reads them as its `dataset`.")

    def __post_init__(self):
        self.check_at_least_one("resolution", "batch_size", "shard_size")
        check_background(self.background)
        dtype_named(self.dtype)  # raises for an unknown one


@dataclass
class _Item:
    """One image, cropped to its bucket, with its caption; sizes are heights and widths in pixels."""

    row: int
    caption: str
    image: torch.Tensor  # (3, H, W) in [-1, 1]
    original_size: Size
    crop_offset: Size


class _Items(Dataset[_Item]):
    """Rows of a data set as items."""

    def __init__(self, args: PromptEncodingArguments, rows: datasets.Dataset, buckets: list[Size]):
        self.args, self.rows, self.buckets = args, rows, buckets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> _Item:
        columns = self.rows[row]
        image = open_image(columns[self.args.image_column], background=self.args.background)
        size = nearest_bucket(image.height, image.width, self.buckets)
        cropped, offset = crop_to_size(image, *size)
        caption = columns[self.args.text_column]
        return _Item(row, caption, to_tensor(cropped), (image.height, image.width), offset)


@dataclass
class Encoder:
    """
    Encodes rows of a data set.

    Args:
        args ([`PromptEncodingArguments`]): For columns, batch size and dtype.
        pipeline ([`DiffusionPipeline`]): With text encoders and VAE, on the device to compute on.
        text_pipeline ([`TextPipeline`]): Of its family.
        buckets (`list[tuple[int, int]]`): The sizes that images are cropped to.
    """

    args: PromptEncodingArguments
    pipeline: Any
    text_pipeline: TextPipeline
    buckets: list[Size]
    remembered: dict[str, Columns] = field(default_factory=dict)  # the columns of the last captions of a shard

    @property
    def dtype(self) -> torch.dtype:
        """What is stored."""
        return dtype_named(self.args.dtype)

    def shard(self, rows: datasets.Dataset, progress: tqdm) -> datasets.Dataset:
        """
        Encode some rows, in their order.

        Raises:
            ValueError: if what is encoded is not finite.
        """
        self.remembered.clear()  # a shard is the same, to the last bit, whichever was encoded before
        encoded: list[dict[str, Any]] = [{} for _ in range(len(rows))]
        waiting: dict[torch.Size, list[_Item]] = defaultdict(list)  # by shape, until they are a batch
        items_of_rows = _Items(self.args, rows, self.buckets)
        batch_bytes = self.args.batch_size * num_bytes_of(items_of_rows[0].image)
        loader = DataLoader(
            items_of_rows,
            self.args.batch_size,
            num_workers=choose_workers(self.args.dataloader_num_workers, self.pipeline.device, batch_bytes),
            collate_fn=list,
            worker_init_fn=ignore_signals,
        )

        def encode(items: list[_Item]) -> None:
            for item, row in zip(items, self.rows(items)):
                encoded[item.row] = row
            progress.update(len(items))

        for items in loader:
            for item in items:
                # out of the shared memory of the workers, of which there may be little for so many images
                waiting[item.image.shape].append(replace(item, image=item.image.clone()))
                if len(waiting[item.image.shape]) == self.args.batch_size:
                    encode(waiting.pop(item.image.shape))
        for items in waiting.values():
            encode(items)
        return datasets.Dataset.from_list(encoded, features=FEATURES)

    def rows(self, items: list[_Item]) -> list[dict[str, Any]]:
        """The rows of b items of one shape."""
        images = torch.stack([item.image for item in items])
        sides = [images, images.flip(-1)] if self.args.mirror else [images]
        moments = [self.text_pipeline.encode_images(self.pipeline, side) for side in sides]
        mean, std = (torch.stack(each, dim=1).to("cpu", self.dtype) for each in zip(*moments))  # (b, M, C, [F,] h, w)
        captions = [item.caption for item in items]
        prompts, sizes = self.prompts(captions), self.sizes(items)
        height, width = images.shape[-2:]
        self._expect_finite({"images": mean}, captions)
        return [
            {
                LATENTS: to_bytes({"mean": own_mean, "std": own_std}),
                PROMPT: to_bytes(prompt | size),
                CAPTION: caption,
                HEIGHT: height,
                WIDTH: width,
            }
            for own_mean, own_std, prompt, size, caption in zip(mean, std, prompts, sizes, captions)
        ]

    def prompts(self, captions: list[str]) -> list[Columns]:
        """The columns of each caption, on the CPU, in the dtype that is stored; a caption that comes again is encoded once."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.remembered]
        if new:
            columns = self.text_pipeline.encode_prompts(self.pipeline, new)
            for index, caption in enumerate(new):
                prompt = {name: self._stored(column[index]).clone() for name, column in columns.items()}
                self._expect_finite(prompt, [caption])
                self.remembered[caption] = prompt
        prompts = [self.remembered[caption] for caption in captions]
        for caption in list(self.remembered)[:-MAX_REMEMBERED]:
            del self.remembered[caption]
        return prompts

    def sizes(self, items: list[_Item]) -> list[Columns]:
        """What the denoiser is told of the sizes of each image, in the family's own dtype: half precision would round them."""
        target = [tuple(item.image.shape[-2:]) for item in items]
        sizes = ([item.original_size for item in items], [item.crop_offset for item in items], target)
        columns = self.text_pipeline.size_columns(*(torch.tensor(each) for each in sizes))
        return [{name: column[index] for name, column in columns.items()} for index in range(len(items))]

    def _stored(self, column: torch.Tensor) -> torch.Tensor:
        return column.to("cpu", self.dtype if column.is_floating_point() else column.dtype)

    def _expect_finite(self, columns: Columns, captions: list[str]) -> None:
        for name, column in columns.items():
            if not column.isfinite().all():
                raise ValueError(
                    f"Expected encoded images and captions to be finite, but {name!r} is not, of {captions}, in {self.args.dtype}; "
                    "bfloat16 and float32 reach further than float16."
                )
