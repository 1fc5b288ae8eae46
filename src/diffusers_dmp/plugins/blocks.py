"""Where a plugin finds a transformer's blocks, its conditioning and its image tokens.

Legend: B batch, N image tokens, D width.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel
from torch import nn

from ..saving.naming import PACKAGE, full_name

# The functions below are no lambdas because transformers with prompts must be picklable.


def _output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output


def _second_output(embedder: nn.Module, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return output[1]


def _width(model: ModelMixin) -> int:
    return model.config.num_attention_heads * model.config.attention_head_dim


def _num_tokens(model: ModelMixin) -> int:
    return (model.config.sample_size // model.config.patch_size) ** 2


def _stock_embedding(embedder: nn.Module, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder(inputs["timestep"], inputs["class_labels"], hidden_dtype=hidden_states.dtype)


def _stock_time_embedding(embedder: Any, hidden_states: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    return embedder.timestep_embedder(embedder.time_proj(inputs["timestep"]).to(hidden_states.dtype))


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """
    Where to find the embedding that conditions the blocks: (B, D), or (1, D) where the whole batch shares it.

    Args:
        embedder (`str`): Dotted name of the module that computes the embedding.
        read (`Callable[[nn.Module, Any, dict], torch.Tensor]`): Returns the embedding, given the embedder, its output, and
            the arguments of the transformer's `forward` by name. By default, the embedding is the embedder's output.
        after (`str`, *optional*): For transformers whose blocks call the embedder themselves, which is too late: dotted
            name of a module that runs before the first block. `read` gets the output of that module instead.
    """

    embedder: str
    read: Callable[[nn.Module, Any, dict[str, Any]], torch.Tensor] = _output
    after: str | None = None

    @property
    def observed(self) -> str:
        """The dotted name of the module whose output `read` gets."""
        return self.after or self.embedder


@dataclass(frozen=True, kw_only=True)
class TransformerLayout:
    """
    Where one class of transformers, and its subclasses, have what plugins need; see [`register_layout`].

    Args:
        blocks (`str`): Dotted name of the `nn.ModuleList` of blocks, which a forward pass calls once each, in order.
        image_tokens (`str`): The argument of a block's `forward` that takes the image tokens (B, N, D).
        conditioning ([`Conditioning`]): For the gates of added prompts, the embedding of timestep and label.
        time_conditioning ([`Conditioning`], *optional*): For the gates of prepended prompts, the embedding of the timestep
            alone. Leave it out if the blocks cannot take extra tokens (because of rotary embeddings, for example) or
            return anything but the tokens.
        depends_on (`tuple[str, ...]`): All arguments of the transformer's `forward` that decide the conditioning, the
            timestep first. Gates are cached by them while sampling.
        width (`Callable[[nn.Module], int]`): Returns the transformer's D.
        num_tokens (`Callable[[nn.Module], int]`): Returns the transformer's N at the image size that it was trained on.
    """

    blocks: str = "transformer_blocks"
    image_tokens: str = "hidden_states"
    conditioning: Conditioning
    time_conditioning: Conditioning | None = None
    depends_on: tuple[str, ...]
    width: Callable[[Any], int] = _width
    num_tokens: Callable[[Any], int] = _num_tokens


_PIXART_TIME = Conditioning(embedder="adaln_single", read=_second_output)
_STOCK_EMBEDDER = {"embedder": "transformer_blocks.0.norm1.emb", "after": "pos_embed"}  # each block has a copy of it

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
    Register the layout of a class of transformers, so that prompts can be attached to them.

    ```py
    register_layout(
        MyTransformer,
        TransformerLayout(
            blocks="layers", conditioning=Conditioning(embedder="time_embed"), depends_on=("timestep",)
        ),
    )
    ```

    Args:
        transformer_class (`type`): The class. Its subclasses have the same layout unless they are registered themselves.
        layout ([`TransformerLayout`]): Where its transformers have their blocks, conditioning and image tokens.
    """
    _LAYOUTS[full_name(transformer_class)] = layout


def layout_of(transformer: nn.Module) -> TransformerLayout:
    """
    Return the layout of a transformer's class, or of the nearest parent class that has one.

    Raises:
        ValueError: if no layout is registered for any of them.
    """
    for cls in type(transformer).__mro__:
        if full_name(cls) in _LAYOUTS:
            return _LAYOUTS[full_name(cls)]
    raise ValueError(
        f"Expected `transformer` to be one of {', '.join(name.rpartition('.')[2] for name in _LAYOUTS)}, but got a "
        f"{type(transformer).__name__}; register its layout with `diffusers_dmp.register_layout`."
    )


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """
    Return a transformer's blocks in order.

    Raises:
        ValueError: if no layout is registered for the transformer, or it has no blocks where its layout says.
    """
    blocks: Any = submodule_of(transformer, layout_of(transformer).blocks)
    return list(blocks)


def submodule_of(transformer: nn.Module, name: str) -> nn.Module:
    """
    Return the module of a transformer that its layout names.

    Raises:
        ValueError: if the transformer has no such module.
    """
    try:
        return transformer.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"Expected the layout of {type(transformer).__name__} to name modules that it has, but got {name!r}."
        ) from error


def forward_argument_names(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's `forward`, without `self`."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def check_argument(field: str, name: str, module: nn.Module) -> None:
    """
    Check that a module's `forward` has an argument that its layout names.

    Args:
        field (`str`): The field of the layout.
        name (`str`): The argument.
        module (`nn.Module`): The module.

    Raises:
        ValueError: if there is no such argument.
    """
    valid = forward_argument_names(module)
    if name not in valid:
        raise ValueError(
            f"Expected `{field}` to name arguments of {type(module).__name__}'s `forward`, {', '.join(valid)}, "
            f"but got {name!r}."
        )
