"""Where the blocks of a denoiser are, and which argument of a block continues which output of the one before: its streams.

A stream is what flows from block to block: the tokens of the image, and in some transformers those of the text beside them. Where
a block takes all tokens in one sequence, this sequence is the image's stream.

Legend: B batch, N tokens, D channels.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..saving.naming import full_name
from .stream_names import BLOCK_LISTS, IMAGE_ARGUMENTS, IMAGE_FIRST, OTHER_STREAMS, STREAM_OUTPUTS


@dataclass(frozen=True)
class Stream:
    """
    Where a block takes and returns one stream.

    Args:
        argument (`str`): The argument of the block's `forward`.
        output (`int`, *optional*): The place in the tuple that the block returns. None for a block that returns nothing else.
        channels (`int`): The dimension of the channels D: -1 for tokens (B, N, D), 1 for features (B, D, h, w).
    """

    argument: str = "hidden_states"
    output: int | None = None
    channels: int = -1

    def input_of(self, names: list[str], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """
        Return the stream from the arguments of a call, or None if it is not there.

        Args:
            names (`list[str]`): The names of the block's arguments: `block.argument_names`.
            args, kwargs: The arguments.
        """
        if self.argument in kwargs:
            return kwargs[self.argument]
        position = names.index(self.argument)
        return args[position] if position < len(args) else None

    def with_input(
        self, names: list[str], args: tuple, kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of a call with another input for this stream."""
        if self.argument in kwargs:
            return args, kwargs | {self.argument: value}
        position = names.index(self.argument)
        return (*args[:position], value, *args[position + 1 :]), kwargs

    def output_of(self, output: Any) -> Any:
        """
        Return the stream from what a block returned; None if the block ends it, as the last one of SD3 ends the text.

        Raises:
            ValueError: if the block returned several tensors and it is not known which one continues the stream.
        """
        expected: Any = torch.Tensor if self.output is None else tuple
        if not isinstance(output, expected):
            raise ValueError(
                f"Expected a block to return a {expected.__name__} that continues its `{self.argument}`, but got a "
                f"{type(output).__name__}; teach which output continues it with `register_streams`."
            )
        return output if self.output is None else output[self.output]

    def with_output(self, output: Any, value: torch.Tensor) -> Any:
        """Return what a block returned with another output for this stream."""
        if self.output is None:
            return value
        return (*output[: self.output], value, *output[self.output + 1 :])


@dataclass(frozen=True)
class Block:
    """
    A block of a denoiser, and its streams.

    Args:
        name (`str`): The dotted name of the module in the denoiser.
        module (`nn.Module`): The module.
        streams (`dict[str, Stream]`): By name: 'image', and 'text' or 'audio' where the block has them.
        width (`int`, *optional*): The image's channels D, where they are known without a call.
    """

    name: str
    module: nn.Module
    streams: Mapping[str, Stream]
    width: int | None = None

    @property
    def argument_names(self) -> list[str]:
        """The names of the arguments of the block's `forward`."""
        return _arguments_of(self.module)


# UNets, whose blocks stand at different depths: the classes of blocks that return as many channels as they take.
_UNETS = ("UNet2DConditionModel", "UNet2DModel", "PatchedUNet2DModel")
_UNET_BLOCKS = {
    "BasicTransformerBlock": Stream(),
    "PatchedUNetLayer": Stream(channels=1),
    "ResnetBlock2D": Stream("input_tensor", channels=1),
}

_TAUGHT: dict[str, Mapping[str, Mapping[str, Stream]]] = {}  # by the full names of classes


def register_streams(denoiser_class: type[nn.Module], streams: Mapping[str, Mapping[str, Stream]]) -> None:
    """
    Teach where a class of denoisers has its blocks, and their streams.

    ```py
    register_streams(MyTransformer, {"stages": {"image": Stream("tokens", output=1), "text": Stream("text", output=0)}})
    ```

    [`observe_streams`] finds them by watching a forward pass.

    Args:
        denoiser_class (`type`): The class. Its subclasses have the same streams unless they are registered themselves.
        streams (`dict[str, dict[str, Stream]]`): For each list of blocks, by its dotted name, the streams of its blocks by
            their names, of which 'image' is the one that plugins change by default.

    Raises:
        ValueError: if a list of blocks has no stream 'image'.
    """
    for blocks, named in streams.items():
        if "image" not in named:
            raise ValueError(f"Expected `streams[{blocks!r}]` to have a stream 'image', but got {', '.join(named)}.")
    _TAUGHT[full_name(denoiser_class)] = streams


def blocks_with_streams(denoiser: nn.Module) -> list[Block]:
    """
    Find the blocks of a denoiser and their streams, without calling it.

    Args:
        denoiser (`nn.Module`): Any transformer with lists of blocks, as Diffusers' are, or a UNet for images, of which those
            residual and transformer blocks count that return as many channels as they take.

    Returns:
        `list[Block]`: In order.

    Raises:
        ValueError: if there are none; [`register_streams`] teaches where they are.
    """
    blocks = _registered_blocks(denoiser)
    if blocks is None:
        is_unet = any(cls.__name__ in _UNETS for cls in type(denoiser).__mro__)
        blocks = _unet_blocks(denoiser) if is_unet else _listed_blocks(denoiser)
    if not blocks:
        name = type(denoiser).__name__
        raise ValueError(
            f"Expected a denoiser with blocks in one of {', '.join(BLOCK_LISTS)}, but got a {name}; teach where they are with "
            f"`register_streams({name}, …)`, and `observe_streams(denoiser, …)` finds out by watching a forward pass."
        )
    return blocks


def observe_streams(denoiser: nn.Module, *args: Any, **kwargs: Any) -> dict[str, dict[str, Stream]]:
    """
    Find the streams of a denoiser's blocks by watching one forward pass: what is the very output of the block before.

    ```py
    register_streams(MyTransformer, observe_streams(my_transformer, hidden_states=…, timestep=…))
    ```

    Args:
        denoiser (`nn.Module`): The denoiser; modules in its `nn.ModuleList`s are taken for blocks.
        args, kwargs: The arguments of a call.

    Returns:
        `dict[str, dict[str, Stream]]`: The streams by the names of the lists, without lists in which no block continues
        another; see [`register_streams`]. Streams are named after their arguments: 'text', 'audio', and otherwise 'image'.
    """
    calls: list[tuple[str, list[str], dict[str, Any], Any]] = []  # list, argument names, arguments, output

    def watch(blocks: str, block: nn.Module) -> Any:
        names = _arguments_of(block)
        return block.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(
                (blocks, names, dict(zip(names, args)) | kwargs, output)
            ),
            with_kwargs=True,
        )

    lists = [(name, child) for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
    handles = [watch(name, block) for name, blocks in lists for block in blocks]
    try:
        with torch.no_grad():
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

    found: dict[str, dict[str, Stream]] = {}
    for (blocks, names, _, output), (_, _, following, _) in zip(calls, calls[1:]):
        outputs = list(enumerate(output)) if isinstance(output, tuple) else [(None, output)]
        for place, tensor in outputs:
            for argument, value in following.items():
                if isinstance(tensor, torch.Tensor) and value is tensor and argument in names:
                    found.setdefault(blocks, {})[_stream_name(argument)] = Stream(argument, place)
    return found


def _stream_name(argument: str) -> str:
    if argument in IMAGE_ARGUMENTS:
        return "image"
    known = next((name for name, arguments in OTHER_STREAMS.items() if argument in arguments), None)
    return known or next((name for name in OTHER_STREAMS if name in argument), "image")


def _registered_blocks(denoiser: nn.Module) -> list[Block] | None:
    taught = next((_TAUGHT[full_name(cls)] for cls in type(denoiser).__mro__ if full_name(cls) in _TAUGHT), None)
    if taught is None:
        return None
    width = _width_of(denoiser)
    lists: list[tuple[str, Any]] = [(name, denoiser.get_submodule(name)) for name in taught]
    return [
        Block(f"{name}.{index}", block, taught[name], width)
        for name, blocks in lists
        for index, block in enumerate(blocks)
    ]


def _listed_blocks(denoiser: nn.Module) -> list[Block]:
    lists = [(name, getattr(denoiser, name, None)) for name in BLOCK_LISTS]
    width = _width_of(denoiser)
    return [
        Block(f"{name}.{index}", block, streams, width)
        for name, blocks in lists
        if isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks)
        if (streams := _streams_of(block))
    ]


def _streams_of(block: nn.Module) -> dict[str, Stream]:
    """The streams of a block of a class in Diffusers' convention; none if it takes no image."""
    names = _arguments_of(block)
    image = next((name for name in IMAGE_ARGUMENTS if name in names), None)
    if image is None:
        return {}
    outputs = _outputs_of(block)
    streams = {"image": Stream(image)}
    for name in outputs:
        argument = image if name == "image" else next(each for each in OTHER_STREAMS[name] if each in names)
        streams[name] = Stream(argument, outputs.index(name))
    return streams


def _outputs_of(block: nn.Module) -> tuple[str, ...]:
    if type(block).__name__ == "HiDreamBlock":  # in both of its lists
        return IMAGE_FIRST if type(block.block).__name__ == "HiDreamImageTransformerBlock" else ()
    return next((STREAM_OUTPUTS[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in STREAM_OUTPUTS), ())


def _unet_blocks(denoiser: nn.Module) -> list[Block]:
    return [
        Block(name, module, {"image": _UNET_BLOCKS[type(module).__name__]}, width)
        for name, module in denoiser.named_modules()
        if type(module).__name__ in _UNET_BLOCKS and (width := _width_kept(module)) is not None
    ]


def _width_kept(block: Any) -> int | None:
    """The channels of a UNet's block that returns features of the same shape as it takes; None for another."""
    if type(block).__name__ == "BasicTransformerBlock":
        return block.dim
    convolutions = block.resnet if type(block).__name__ == "PatchedUNetLayer" else block
    taken, returned = convolutions.conv1.in_channels, convolutions.conv2.out_channels
    resized = getattr(block, "up", False) or getattr(block, "down", False)
    return taken if taken == returned and not resized else None


def _width_of(denoiser: Any) -> int | None:
    """The channels of a transformer's image stream, where its configuration says so in one of the usual ways."""
    config = getattr(denoiser, "config", {})
    if config.get("num_attention_heads") and config.get("attention_head_dim"):
        return config["num_attention_heads"] * config["attention_head_dim"]
    return next((config[name] for name in ("dim", "hidden_size") if isinstance(config.get(name), int)), None)


def _arguments_of(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]
