"""Where a plugin finds a transformer's blocks, its conditioning and its image tokens.

Legend: B batch, N image tokens, D width.
"""

import inspect
from typing import Any

from torch import nn

from ..saving.naming import full_name
from .layouts import LAYOUTS, TransformerLayout
from .streams import Block, Stream, blocks_with_streams

_LAYOUTS = dict(LAYOUTS)  # with those that are registered


def register_layout(transformer_class: type[nn.Module], layout: TransformerLayout) -> None:
    """
    Register the layout of a class of transformers, so that prompts can be attached to them.

    ```py
    register_layout(
        MyTransformer,
        TransformerLayout(conditioning=Conditioning(embedder="time_embed"), depends_on=("timestep",)),
    )
    ```

    Args:
        transformer_class (`type`): The class. Its subclasses have the same layout unless they are registered themselves.
        layout ([`TransformerLayout`]): Where its transformers have their blocks, conditioning and image tokens.
    """
    _LAYOUTS[_name_of(transformer_class)] = layout


def layout_of(transformer: nn.Module) -> TransformerLayout:
    """
    Return the layout of a transformer's class, or of the nearest parent class that has one.

    Raises:
        ValueError: if no layout is registered for any of them.
    """
    for cls in type(transformer).__mro__:
        if _name_of(cls) in _LAYOUTS:
            return _LAYOUTS[_name_of(cls)]
    raise ValueError(
        f"Expected `transformer` to be one of {', '.join(name.rpartition('.')[2] for name in _LAYOUTS)}, but got a "
        f"{type(transformer).__name__}; register its layout with `diffusers_dmp.register_layout`."
    )


def _name_of(cls: type) -> str:
    is_of_diffusers = cls.__module__.partition(".")[0] == "diffusers"
    return f"diffusers.{cls.__name__}" if is_of_diffusers else full_name(cls)


def blocks_of(transformer: nn.Module) -> list[Block]:
    """
    Return a transformer's blocks in order, with the stream of the image's tokens.

    Raises:
        ValueError: if no layout is registered for the transformer, it has no blocks where its layout says, or they are not
            found.
    """
    layout = layout_of(transformer)
    if layout.blocks is None and layout.image_tokens is None:
        return blocks_with_streams(transformer)
    name = layout.blocks or "transformer_blocks"
    blocks: Any = submodule_of(transformer, name)
    streams = {"image": Stream(layout.image_tokens or "hidden_states")}
    return [Block(f"{name}.{index}", block, streams) for index, block in enumerate(blocks)]


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
