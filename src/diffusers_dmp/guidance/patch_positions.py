"""Where the patches of packed latents are, as a pipeline tells its denoiser.

Legend: B batch, N patches, L all tokens of images, D coordinates.
"""

import weakref
from typing import Any

import torch
from torch import nn

from ..plugins.hooks import ForwardHooks

# The positions of all tokens (L, D), of which the last two coordinates are row and column: Flux, Chroma
TOKEN_POSITIONS = "img_ids"
# (frames, rows, columns) of each image, for each sample: Qwen-Image
IMAGE_SHAPES = "img_shapes"


class PatchPositions:
    """Rows and columns of the patches that a denoiser was last called with."""

    def __init__(self) -> None:
        self._told: dict[str, Any] = {}
        self._read: tuple[torch.Tensor, int, tuple[int, int]] | None = None

    def note_calls_of(self, denoiser: nn.Module, while_used: Any) -> None:
        """
        Note what a denoiser is told at each call.

        Args:
            denoiser (`nn.Module`): The denoiser. It gets a hook, which changes nothing.
            while_used: The hook is removed when this object no longer exists.
        """
        hook = _PositionsHook(self)
        hook.hooks.before(denoiser, hook)
        # held weakly: nothing here keeps a denoiser in memory
        weakref.finalize(while_used, _remove, weakref.ref(hook.hooks))

    def note(self, arguments: dict[str, Any]) -> None:
        """Note the arguments of a call."""
        self._told = {name: arguments[name] for name in (TOKEN_POSITIONS, IMAGE_SHAPES) if name in arguments}

    def forget(self) -> None:
        """Forget the last call."""
        self._told, self._read = {}, None

    def grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """
        Return the rows and columns of packed latents, the first patches of the last call.

        Tokens of reference images (Flux Kontext, Qwen-Image-Edit) come after them.

        Args:
            latents (`torch.Tensor` of shape (B, N, C)): The latents.

        Raises:
            ValueError: if the denoiser was not told positions, or others than those of N patches row by row.
        """
        if latents.ndim != 3:
            raise ValueError(f"Expected packed latents (B, N, C), but got the shape {tuple(latents.shape)}.")
        count = latents.shape[1]
        if IMAGE_SHAPES in self._told:
            return _grid_of_shapes(self._told[IMAGE_SHAPES], count)
        if TOKEN_POSITIONS in self._told:
            positions = self._told[TOKEN_POSITIONS]
            # pipelines pass the same tensor at each step: it is read from an accelerator once
            if self._read is None or self._read[0] is not positions or self._read[1] != count:
                self._read = positions, count, _grid_of_positions(positions, count)
            return self._read[2]
        raise ValueError(
            f"Expected the denoiser to be told the positions of its patches, as `{TOKEN_POSITIONS}` or `{IMAGE_SHAPES}`, before "
            "they are decoded, but it was not. If the pipeline has got another denoiser, call `GuidedScheduler.for_pipeline` again."
        )


class _PositionsHook:
    """The hook on a denoiser. It owns the hooks' handle, so that nobody else has to, and a copied denoiser has its own."""

    def __init__(self, positions: PatchPositions):
        self.positions = positions
        self.hooks = ForwardHooks()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.positions.note(kwargs)


def _remove(hooks: "weakref.ref[ForwardHooks]") -> None:
    present = hooks()
    if present is not None:
        present.remove()


def _grid_of_shapes(shapes: Any, count: int) -> tuple[int, int]:
    """Rows and columns of `img_shapes`: of each sample one (frames, rows, columns), or a list of them."""
    first = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
    frames, rows, columns = (int(size) for size in first)
    if frames != 1 or rows * columns != count:
        raise ValueError(
            f"Expected the first of `{IMAGE_SHAPES}` to be an image of {count} patches, but got {frames} x {rows} x {columns}."
        )
    return rows, columns


def _grid_of_positions(positions: torch.Tensor, count: int) -> tuple[int, int]:
    """Rows and columns of `img_ids` (L, D), or the same for each sample (B, L, D)."""
    tokens = (positions if positions.ndim == 2 else positions[0])[:count, -2:].cpu()
    other_rows = (tokens[:, 0] != tokens[0, 0]).nonzero()
    columns = int(other_rows[0]) if len(other_rows) else len(tokens)
    rows = count // columns
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    if rows * columns != count or not torch.equal(tokens, expected.to(tokens.dtype)):  # whole numbers, rounded alike
        raise ValueError(
            f"Expected the first {count} of `{TOKEN_POSITIONS}` to be the positions of a whole image, row by row, but got others."
        )
    return rows, columns
