"""The rows of encoded images and captions, as shards hold them: from tensors to bytes, back, and to batches.

A row has the columns

- `latents`: safetensors of `mean` and `std`, both (M, C, [F,] h, w), as the denoiser sees them. M is 1, or 2 with the mirror image;
- `prompt`: safetensors of what else the denoiser is called with, the columns of the prompt and of the image's size;
- `caption`: the text; `height` and `width`: of the image as it was encoded, in pixels.

Legend: b batch, C channels, F frames (videos only), h and w height and width of the latents, L text tokens.
"""

from typing import Any

import datasets
import safetensors.torch
import torch
from torch import nn

from .images import LATENTS

PROMPT, CAPTION, HEIGHT, WIDTH = "prompt", "caption", "height", "width"
FEATURES = datasets.Features(
    {
        LATENTS: datasets.Value("large_binary"),  # a shard's bytes may be more than the 2 GB that `binary` can have
        PROMPT: datasets.Value("large_binary"),
        CAPTION: datasets.Value("string"),
        HEIGHT: datasets.Value("int32"),
        WIDTH: datasets.Value("int32"),
    }
)

Columns = dict[str, torch.Tensor]


def to_bytes(columns: Columns) -> bytes:
    """Some columns of one sample as safetensors."""
    return safetensors.torch.save({name: column.cpu().contiguous() for name, column in columns.items()})


def read_rows(rows: dict[str, list[Any]]) -> dict[str, list[torch.Tensor]]:
    """
    Make tensors of rows: `mean`, `std` and the columns of the prompt.

    Args:
        rows (`dict[str, list]`): As `datasets` hands them to a transform, one list per column.

    Returns:
        `dict[str, list[torch.Tensor]]`: In the same layout.
    """
    samples = [
        safetensors.torch.load(latents) | safetensors.torch.load(prompt)
        for latents, prompt in zip(rows[LATENTS], rows[PROMPT])
    ]
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def collate(samples: list[Columns]) -> Columns:
    """
    Make a batch of samples.

    Args:
        samples (`list[dict[str, torch.Tensor]]`): b samples with the same columns, whose latents have one shape.

    Returns:
        `dict[str, torch.Tensor]`: Columns (b, …). Of texts with different numbers of tokens, the shorter ones are padded with
        zeros: (b, L, …) with the longest L.
    """
    return {name: _stack([sample[name] for sample in samples]) for name in samples[0]}


def _stack(column: list[torch.Tensor]) -> torch.Tensor:
    is_ragged = len({tensor.shape for tensor in column}) > 1
    return nn.utils.rnn.pad_sequence(column, batch_first=True) if is_ragged else torch.stack(column)
