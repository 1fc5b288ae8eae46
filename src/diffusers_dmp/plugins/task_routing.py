"""DTR on the blocks of any denoiser: which channels a block reads depends on the timestep.
https://arxiv.org/abs/2310.07138

Legend: T training timesteps.
"""

from dataclasses import dataclass, field
from typing import Any

from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..intervals import NoiseIntervals
from ..models.channel_routing import ChannelRouting, check_routing
from ..saving.adapters import check_component
from .routing_attachment import RoutingAttachment

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
    _attachment: RoutingAttachment | None = field(default=None, init=False, repr=False, compare=False)

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
        self._attachment = RoutingAttachment(self, denoiser)
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
        if getattr(denoiser, "is_cache_enabled", False) or any(map(_is_cached, denoiser.modules())):
            raise ValueError(
                f"Expected a {name} without a cache, which would miss the channels that bypass a block, but got one with; "
                "`disable_cache()` (or load it again), attach, and enable the cache then."
            )

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the routing alone is attached to nothing; where the denoiser is copied, its attachment attaches the copy
        return self.__dict__ | {"_attachment": None}


def _is_cached(module: nn.Module) -> bool:
    """Whether one of Diffusers' caches is around a module, also where a function such as `apply_first_block_cache` put it."""
    # private attributes of Diffusers, which has a public one for `enable_cache` alone
    registry = getattr(module, "_diffusers_hook", None)
    return any(getattr(hook, "_is_stateful", False) for hook in getattr(registry, "hooks", {}).values())


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
