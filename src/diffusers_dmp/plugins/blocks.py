"""Where a patch finds in a transformer what it needs: its blocks, its conditioning, its image tokens.

Legend: B batch, N image tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import nn

from ..saving.naming import PACKAGE, full_name

# The functions below have names because lambdas, and hence transformers with a patch, could not be pickled.


def _output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output


def _second_output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output[1]


def _width(model: nn.Module) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _num_tokens(model: nn.Module) -> int:
    return (model.config.sample_size // model.config.patch_size) ** 2


def _stock_embedding(embedder: nn.Module, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder(inputs["timestep"], inputs["class_labels"], hidden_dtype=hidden_states.dtype)


def _stock_time_embedding(embedder: nn.Module, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder.timestep_embedder(embedder.time_proj(inputs["timestep"]).to(hidden_states.dtype))


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """
    What the blocks are conditioned on, (B, D), or (1, D) where the batch shares it.

    Args:
        embedder (`str`): Dotted name of the module that computes it.
        read (`Callable[[nn.Module, Any, dict], torch.Tensor]`): From the embedder, from what it returned, and from the
            arguments of the transformer's `forward` by name, to the conditioning. What it returned, by default.
        after (`str`, *optional*): Where the blocks embed for themselves, which is too late for a patch: the module ahead
            of the first block upon whose output `read` is called instead.
    """

    embedder: str
    read: Callable[[nn.Module, Any, dict[str, Any]], torch.Tensor] = _output
    after: str | None = None

    @property
    def observed(self) -> str:
        """The module that is watched."""
        return self.after or self.embedder


@dataclass(frozen=True, kw_only=True)
class TransformerLayout:
    """
    How one class of transformers, and its subclasses, are patched; see [`register_layout`].

    Args:
        blocks (`str`): Dotted name of the `nn.ModuleList` of blocks, each called once in a forward pass, in order.
        image_tokens (`str`): The argument of a block's `forward` that the N image tokens (B, N, D) come in.
        conditioning ([`Conditioning`]): Of the gates of added prompts: embedding of timestep and label.
        time_conditioning ([`Conditioning`], *optional*): Of the gates of prepended prompts: embedding of the timestep
            alone. Leave it out if the blocks cannot take extra tokens (for rotary embeddings, say), or return other
            things than tokens.
        depends_on (`tuple[str, ...]`): All arguments of the transformer's `forward` that decide the conditioning, the
            timestep first: what gates are kept by while sampling.
        width (`Callable[[nn.Module], int]`): The transformer's D.
        num_tokens (`Callable[[nn.Module], int]`): Its N, at its trained size.
    """

    blocks: str = "transformer_blocks"
    image_tokens: str = "hidden_states"
    conditioning: Conditioning
    time_conditioning: Conditioning | None = None
    depends_on: tuple[str, ...]
    width: Callable[[nn.Module], int] = _width
    num_tokens: Callable[[nn.Module], int] = _num_tokens


_PIXART_TIME = Conditioning(embedder="adaln_single", read=_second_output)
_STOCK_EMBEDDER = {"embedder": "transformer_blocks.0.norm1.emb", "after": "pos_embed"}  # all blocks have copies of it

_LAYOUTS: dict[str, TransformerLayout] = {  # by the full names of classes
    f"{PACKAGE}.DiTModel": TransformerLayout(  # DTR and Remix-DiT as well
        conditioning=Conditioning(embedder="time_label_embed"),
        time_conditioning=Conditioning(embedder="time_label_embed.timestep_embedder"),
        depends_on=("timestep", "class_labels", "force_drop_ids"),
    ),
    full_name(DiTTransformer2DModel): TransformerLayout(
        conditioning=Conditioning(**_STOCK_EMBEDDER, read=_stock_embedding),
        time_conditioning=Conditioning(**_STOCK_EMBEDDER, read=_stock_time_embedding),
        depends_on=("timestep", "class_labels"),
    ),
    full_name(PixArtTransformer2DModel): TransformerLayout(  # it has a caption instead of a label, and attends to it
        conditioning=_PIXART_TIME,
        time_conditioning=_PIXART_TIME,
        depends_on=("timestep", "added_cond_kwargs"),
    ),
}


def register_layout(transformer_class: type[nn.Module], layout: TransformerLayout) -> None:
    """
    Teach patches a class of transformers:

    ```py
    register_layout(
        MyTransformer,
        TransformerLayout(
            blocks="layers", conditioning=Conditioning(embedder="time_embed"), depends_on=("timestep",)
        ),
    )
    ```

    Args:
        transformer_class (`type`): It and its subclasses are meant.
        layout ([`TransformerLayout`]): Where to find what.
    """
    _LAYOUTS[full_name(transformer_class)] = layout


def layout_of(transformer: nn.Module) -> TransformerLayout:
    """
    The layout of its class, or of the nearest class that it descends from.

    Raises:
        ValueError: if there is none.
    """
    for cls in type(transformer).__mro__:
        if full_name(cls) in _LAYOUTS:
            return _LAYOUTS[full_name(cls)]
    raise ValueError(
        f"Expected `transformer` to be one of {', '.join(name.rpartition('.')[2] for name in _LAYOUTS)}, but got a "
        f"{type(transformer).__name__}; `diffusers_dmp.register_layout` teaches patches another class."
    )
