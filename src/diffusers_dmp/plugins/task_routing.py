"""DTR on the blocks of any denoiser: which channels a block reads depends on the timestep.
https://arxiv.org/abs/2310.07138

Legend: B batch, N tokens, D width, T training timesteps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..intervals import NoiseIntervals, check_timesteps
from ..models.channel_routing import ChannelRouting, active_channels, check_routing, with_inactive_channels
from ..models.time_argument import ExpertFinder
from ..saving.adapters import check_component
from .forward_passes import ForwardPasses
from .hooks import ForwardHooks
from .streams import Block, blocks_with_streams

CONFIG_KEY = "task_routing"
_ATTRIBUTE = "_task_routing"  # where a denoiser has its routing
_REMINDER = "attach it after loading: diffusers_dmp.TaskRouting.restore(pipe)"


@dataclass
class TaskRouting:
    r"""
    Denoising Task Routing (https://arxiv.org/abs/2310.07138) for any denoiser: each block reads a window of channels that
    moves with the timestep, and the other channels bypass it, out = block(m_t ⊙ x) + (1 - m_t) ⊙ x.

    ```py
    TaskRouting(sharing_ratio=0.8).attach(transformer)  # and train it from scratch
    …
    pipe = DiffusionPipeline.from_pretrained("user/trained-with-routing")
    TaskRouting.restore(pipe)  # the routing it was trained with
    ```

    It is an architecture to train with, without parameters of its own, and no plugin for weights that were trained without it:
    those it makes worse. [`DTRTransformer2DModel`] is the same for this package's DiT.

    Every sample has the mask of its own timestep, read from what the denoiser itself is told, rounded as it is. Where there is a
    time for each token, the noisiest counts. The routing is written to the denoiser's configuration, so that `save_pretrained`
    saves it; Diffusers warns that it does not expect it when such a denoiser is loaded, and [`~TaskRouting.restore`] attaches it.
    A copy of the denoiser has a copy of the routing. Attach it before a cache is enabled.

    Args:
        sharing_ratio (`float`): The share β in (0, 1] of channels that are active. With 1, nothing changes.
        routing_alpha (`float`): α > 0. With larger values, the windows of timesteps with little noise lie closer together.
        num_train_timesteps (`int`): T.
        streams (`tuple[str, ...]`): What is routed, where the blocks have it: 'image', 'text', 'audio'. Where blocks take image
            and text in one sequence, this is the image's stream.

    Raises:
        ValueError: if a number is out of range, or there are no `streams`.
    """

    sharing_ratio: float = 0.8
    routing_alpha: float = 4.0
    num_train_timesteps: int = 1000
    streams: tuple[str, ...] = ("image",)
    _attachment: "_RoutingAttachment | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_routing(self.sharing_ratio, self.routing_alpha)
        if isinstance(self.streams, str) or not self.streams:
            raise ValueError(f"Expected `streams` to be names such as ('image', 'text'), but got {self.streams!r}.")
        self.streams = tuple(self.streams)
        NoiseIntervals.uniform(1, self.num_train_timesteps)  # checks it

    @property
    def denoiser(self) -> nn.Module | None:
        """The denoiser that the routing is attached to, or None."""
        return None if self._attachment is None else self._attachment.denoiser

    @staticmethod
    def attached_to(denoiser: nn.Module) -> "TaskRouting | None":
        """Return the routing that is attached to a denoiser, or None."""
        return vars(unwrap_module(denoiser)).get(_ATTRIBUTE)

    def attach(self, denoiser: nn.Module) -> "TaskRouting":
        """
        Attach the routing to a denoiser, and write it to the denoiser's configuration.

        Args:
            denoiser (`nn.Module`): Any transformer with lists of blocks, or UNet for images, compiled or not.

        Returns:
            [`TaskRouting`]: the same object.

        Raises:
            ValueError: if it is not known where the denoiser's blocks are or how it is told the time (see
                [`register_streams`], [`register_time_argument`]), no block has the `streams`, it has a routing already or was
                saved with another one, a cache is enabled, or this routing is already attached.
        """
        if self._attachment is not None:
            raise ValueError(
                f"Expected a routing that is attached to nothing, but got that of a {type(self.denoiser).__name__}; "
                "`detach()` it first, or make another one."
            )
        check_component("denoiser", denoiser)
        denoiser = unwrap_module(denoiser)
        self._check_denoiser(denoiser)
        self._attachment = _RoutingAttachment(self, denoiser)
        setattr(denoiser, _ATTRIBUTE, self)
        if isinstance(denoiser, ConfigMixin):
            denoiser.register_to_config(**{CONFIG_KEY: self.to_config()})
        return self

    def detach(self) -> "TaskRouting":
        """
        Detach the routing, and take it out of the denoiser's configuration.

        Returns:
            [`TaskRouting`]: the same object.

        Raises:
            ValueError: if the routing is attached to nothing.
        """
        if self._attachment is None:
            raise ValueError("Expected a routing that is attached to a denoiser, but got one that is not.")
        attachment, self._attachment = self._attachment, None
        attachment.hooks.remove()
        delattr(attachment.denoiser, _ATTRIBUTE)
        if isinstance(attachment.denoiser, ConfigMixin):
            _forget_in_config(attachment.denoiser)
        return self

    @classmethod
    def restore(cls, pipe: Any) -> "list[TaskRouting]":
        """
        Attach the routing that denoisers were saved with, after they were loaded.

        Args:
            pipe ([`DiffusionPipeline`] or `nn.Module`): A pipeline, of which all components are looked at, or one model. A
                model of several denoisers, such as [`DenoiserExperts`], has the routings of its parts.

        Returns:
            `list[TaskRouting]`: The routings, one for each denoiser that was saved with one.

        Raises:
            ValueError: if nothing was saved with a routing.
        """
        components = [pipe] if isinstance(pipe, nn.Module) else list(pipe.components.values())
        models = [unwrap_module(component) for component in components if isinstance(component, nn.Module)]
        found = [
            cls.attached_to(denoiser) or routing.attach(denoiser)
            for model in models
            for denoiser, routing in _saved_routings(model)
        ]
        if not found:
            raise ValueError(
                f"Expected a denoiser whose configuration has an entry `{CONFIG_KEY}`, but got a {type(pipe).__name__} without; "
                "`TaskRouting(…).attach(denoiser)` begins one."
            )
        return found

    def to_config(self) -> dict[str, Any]:
        """Return the settings as JSON can store them."""
        return {
            "sharing_ratio": self.sharing_ratio,
            "routing_alpha": self.routing_alpha,
            "num_train_timesteps": self.num_train_timesteps,
            "streams": list(self.streams),
            "note": _REMINDER,  # Diffusers prints it when it loads the configuration
        }

    def _check_denoiser(self, denoiser: Any) -> None:
        name = type(denoiser).__name__
        has_routing = any(isinstance(module, ChannelRouting) for module in denoiser.modules())
        if has_routing or self.attached_to(denoiser) is not None:
            raise ValueError(f"Expected a {name} without routing, but got one that has it; `detach()` that first.")
        if any(cls.__name__ == "RemixDiTModel" for cls in type(denoiser).__mro__):
            raise ValueError(f"Expected a denoiser that keeps the order of its samples, but got a {name}.")
        saved = _saved_routing(denoiser)
        if saved is not None and saved != self:
            raise ValueError(
                f"Expected the routing that the {name} was saved with, {saved}, but got {self}; `TaskRouting.restore(denoiser)` "
                "attaches that one, and `detach()` afterwards removes it for another."
            )
        trained = getattr(denoiser, "config", {}).get("num_train_timesteps") or self.num_train_timesteps
        if trained != self.num_train_timesteps:
            raise ValueError(
                f"Expected `num_train_timesteps` to be the {trained} of the {name}, but got {self.num_train_timesteps}."
            )
        if getattr(denoiser, "is_cache_enabled", False):
            raise ValueError(
                f"Expected a {name} without a cache, which would miss the channels that bypass a block, but got one with; "
                "`disable_cache()`, attach, and enable it again."
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the routing alone is attached to nothing; where the denoiser is copied, its attachment attaches the copy
        return self.__dict__ | {"_attachment": None}


class _RoutingAttachment:
    """
    The connection of a [`TaskRouting`] and its denoiser: hooks on the denoiser, and functions around its blocks.

    Args:
        routing ([`TaskRouting`]): The routing.
        denoiser (`nn.Module`): The denoiser.

    Raises:
        ValueError: if the two do not fit.
    """

    def __init__(self, routing: TaskRouting, denoiser: nn.Module):
        blocks = blocks_with_streams(denoiser)
        routed = [block for block in blocks if any(name in block.streams for name in routing.streams)]
        self._check_streams(routing, denoiser, blocks)
        self.routing = routing
        self.denoiser = denoiser
        self.finder = ExpertFinder(denoiser, NoiseIntervals.uniform(1, routing.num_train_timesteps))
        self.is_unit_checked = False
        self.passes = ForwardPasses(denoiser)
        self.first_block = routed[0].module
        self.tables: dict[int, ChannelRouting] = {}  # by the number of channels
        for width in sorted({block.width for block in routed if block.width is not None}):
            self._add_table(width)
        self.hooks = ForwardHooks()
        self.hooks.before(denoiser, self._before_denoiser)
        # also after an exception, or else the pass would seem to be still running
        self.hooks.after(denoiser, self._after_denoiser, always_call=True)
        for block in routed:  # inside of caches, which leave out blocks and add what they have changed before
            self.hooks.around(block.module, partial(self._call_block, block, block.argument_names))

    def _before_denoiser(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.passes.begin(_Masks(self.tables, self._timesteps(args, kwargs), _dtype_of(self.first_block)))

    def _after_denoiser(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self.passes.end()

    def _call_block(self, block: Block, names: list[str], forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Give a block the active channels of its streams, and add the others to what it returns."""
        streams = [block.streams[name] for name in self.routing.streams if name in block.streams]
        taken = [(stream, stream.input_of(names, args, kwargs)) for stream in streams]
        taken = [(stream, hidden_states) for stream, hidden_states in taken if hidden_states is not None]
        if not taken or self.routing.sharing_ratio == 1:
            return forward(*args, **kwargs)
        masks: _Masks = self.passes.of(block.module, taken[0][1])
        masked = []
        for stream, hidden_states in taken:
            width = hidden_states.shape[stream.channels]
            if width not in self.tables:
                self._add_table(width)
            active, inactive = masks.of(hidden_states, stream.channels)
            args, kwargs = stream.with_input(names, args, kwargs, active_channels(hidden_states, active))
            masked.append((stream, hidden_states, inactive))
        output = forward(*args, **kwargs)
        for stream, hidden_states, inactive in masked:
            returned = stream.output_of(output)
            if returned is None:  # the last block ends the text
                continue
            if returned.shape != hidden_states.shape:
                raise ValueError(
                    f"Expected the block `{block.name}` to return as many channels as it takes, {tuple(hidden_states.shape)}, "
                    f"but got {tuple(returned.shape)}."
                )
            output = stream.with_output(output, with_inactive_channels(returned, hidden_states, inactive))
        return output

    def _timesteps(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The timestep of each sample, (B,), or (1,) for a batch that shares it."""
        value = self.finder.value(args, kwargs)
        if not self.is_unit_checked and not torch.compiler.is_compiling():
            self.finder(args, kwargs)
            self.is_unit_checked = True
        if value.ndim > 0 and value.stride(0) == 0:
            value = value[:1]
        argument, total = self.finder.argument, self.routing.num_train_timesteps
        timesteps = argument.timesteps(value, total)
        if argument.at_pure_noise is not None and value.is_floating_point():
            # whole timesteps that were divided by T may come back a little smaller, and ⌊t⌋ counts
            timesteps = (timesteps + 4 * torch.finfo(torch.float32).eps * total).clamp(max=total)
        check_timesteps(timesteps, total)
        return timesteps

    @torch.compiler.disable
    def _add_table(self, width: int) -> None:
        routing = self.routing
        self.tables[width] = ChannelRouting(
            width, routing.sharing_ratio, routing.routing_alpha, routing.num_train_timesteps
        )

    @staticmethod
    def _check_streams(routing: TaskRouting, denoiser: nn.Module, blocks: list[Block]) -> None:
        valid = sorted({name for block in blocks for name in block.streams})
        unknown = [name for name in routing.streams if name not in valid]
        if unknown:
            raise ValueError(
                f"Expected `streams` to be some of those of a {type(denoiser).__name__}, {', '.join(valid)}, but got "
                f"{', '.join(unknown)}."
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # a copied denoiser has a copied routing, which is not connected to it yet
        self.routing._attachment = self


class _Masks:
    """
    The masks of one forward pass.

    Args:
        tables (`dict[int, ChannelRouting]`): Which channels are active, by the number of channels.
        timesteps (`torch.Tensor` of shape (B,) or (1,)): t.
        dtype (`torch.dtype`): What the features probably have.
    """

    def __init__(self, tables: dict[int, ChannelRouting], timesteps: torch.Tensor, dtype: torch.dtype):
        self.tables = tables
        self.timesteps = timesteps
        self.dtype = dtype
        self.masks = {width: self._compute(width) for width in tables}

    def of(self, hidden_states: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the masks for some features.

        Args:
            hidden_states (`torch.Tensor` of shape (B, N, D) or (B, D, h, w)): The features.
            dim (`int`): The dimension of their channels.

        Returns:
            Two `torch.Tensor` that broadcast to the features: m, 1 for active channels, and 1 - m.

        Raises:
            ValueError: if there are neither one nor B timesteps.
        """
        width, batch_size = hidden_states.shape[dim], len(hidden_states)
        if width not in self.masks:
            self.masks[width] = self._compute(width)
        active, inactive = self.masks[width]
        if len(active) not in (1, batch_size):
            raise ValueError(f"Expected one timestep or one for each of {batch_size} samples, but got {len(active)}.")
        if (active.dtype, active.device) != (hidden_states.dtype, hidden_states.device):
            active, inactive = self.masks[width] = active.to(hidden_states), inactive.to(hidden_states)
        shape = [1] * hidden_states.ndim
        shape[0], shape[dim] = len(active), width
        return active.view(shape), inactive.view(shape)

    def _compute(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.tables[width]
        if table.window_starts.device != self.timesteps.device:  # `to()` and offloading move the denoiser without it
            table.to(self.timesteps.device)
        active = table(self.timesteps)  # (B, D) or (1, D)
        return active.to(self.dtype), (~active).to(self.dtype)


def _dtype_of(block: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()), torch.float32)


def _saved_routing(denoiser: Any) -> TaskRouting | None:
    """The routing in a denoiser's configuration, or None."""
    config = getattr(denoiser, "config", None)
    saved = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    if not isinstance(saved, dict):
        return None
    return TaskRouting(**{name: value for name, value in saved.items() if name != "note"})


def _saved_routings(model: nn.Module) -> list[tuple[nn.Module, TaskRouting]]:
    """The denoisers in a model that were saved with a routing, without those whose parts were."""
    found = {module: routing for module in model.modules() if (routing := _saved_routing(module)) is not None}
    return [
        (module, routing)
        for module, routing in found.items()
        if not any(part in found for part in module.modules() if part is not module)
    ]


def _forget_in_config(denoiser: Any) -> None:
    """Take the routing out of a denoiser's configuration."""
    # a private attribute of Diffusers, whose public `register_to_config` adds entries but removes none
    remaining = {name: value for name, value in denoiser.config.items() if name != CONFIG_KEY}
    denoiser._internal_dict = FrozenDict(remaining)
