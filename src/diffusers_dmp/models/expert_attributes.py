"""What a pipeline reads from its denoiser and sets on it, if the denoiser consists of several experts.

Values are those that the experts have in common, settings reach all of them, and adapters none: they belong to one model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin, UNet2DConditionLoadersMixin
from torch import nn

from .compiled_calls import check_no_graphs, compile_denoisers

# Methods with these names change a setting, of every expert.
_SETTINGS = ("enable_", "disable_", "set_", "reset_", "fuse_", "unfuse_")
_ADAPTER_METHODS = {
    name
    for mixin in (PeftAdapterMixin, UNet2DConditionLoadersMixin)
    for name, member in vars(mixin).items()
    if callable(member) and not name.startswith("__")
}
QUANTISED = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def _of_every_expert(name: str) -> Callable[..., None]:
    def method(self, *args, **kwargs) -> None:
        for expert in self.experts:
            getattr(expert, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"Call `{name}` of every expert."
    return method


class ExpertAttributesMixin:
    """Answer for the experts of a [`ModelMixin`], in front of which it stands among the parent classes."""

    experts: Any  # an `nn.ModuleList` of models
    _offloading_device: Callable[[], Any]
    _cache_context: tuple[tuple, dict[str, Any]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first expert, in which a pipeline passes its inputs."""
        return self.experts[0].dtype

    enable_gradient_checkpointing = _of_every_expert("enable_gradient_checkpointing")
    enable_layerwise_casting = _of_every_expert("enable_layerwise_casting")
    fuse_qkv_projections = _of_every_expert("fuse_qkv_projections")
    unfuse_qkv_projections = _of_every_expert("unfuse_qkv_projections")

    def compile(  # type: ignore[override]  # `torch.compile` itself takes no positional arguments either
        self, *, backend: "str | Callable[..., Any]" = "inductor", mode: str | None = None, **options: Any
    ) -> None:
        """
        Compile every expert, and not the choice between them; see [`ClassConditionalPipeline.compile`].

        Args:
            backend (`str` or `Callable`): A backend of [`torch.compile`].
            mode (`str`, *optional*): If None, 'reduce-overhead' on a CUDA device, which replays CUDA graphs, and 'default' elsewhere,
                with gradients, or if the experts are offloaded.
            options: The other arguments of [`torch.compile`].

        Raises:
            ValueError: as [`ClassConditionalPipeline.compile`] does.
        """
        is_offloaded = self._offloading_device() is not None
        compile_denoisers([self], self.experts[0].device, is_offloaded, backend=backend, mode=mode, **options)  # type: ignore[list-item]

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """
        Call `enable_group_offload` of every expert.

        Raises:
            ValueError: if one was compiled with CUDA graphs.
        """
        check_no_graphs(self.experts, self.experts[0].device)
        for expert in self.experts:
            expert.enable_group_offload(*args, **kwargs)

    @contextmanager
    def cache_context(self, *args, **kwargs) -> Iterator[None]:
        """See [`CacheMixin.cache_context`]: the expert that is called enters it."""
        previous, self._cache_context = self._cache_context, (args, kwargs)
        try:
            yield
        finally:
            self._cache_context = previous

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """What pipelines call at their end."""
        for expert in self.experts:
            if hasattr(expert, "_reset_stateful_cache"):
                expert._reset_stateful_cache(recurse)

    def __getattr__(self, name: str) -> Any:
        """Answer for the experts: settings reach all, values are those that they have in common."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # of `ModelMixin`
        except AttributeError:
            experts = list(vars(self).get("_modules", {}).get("experts", ()))  # none in a copy that is being made
            owners = [expert for expert in experts if hasattr(expert, name)]
            if not owners or (name.startswith("_") and name not in _ADAPTER_METHODS):
                raise
        if name in _ADAPTER_METHODS:
            return _refusal(name)
        if name in QUANTISED:
            return next((getattr(owner, name) for owner in owners if getattr(owner, name)), False)
        value = getattr(experts[0], name, None)
        if len(owners) == len(experts):
            if callable(value) and name.startswith(_SETTINGS):
                return _of_every_expert(name).__get__(self)
            is_layer = isinstance(value, nn.Module) and not isinstance(value, (nn.ModuleList, nn.ModuleDict))
            if is_layer or _is_common(value, [getattr(expert, name) for expert in experts]):
                return value
        raise AttributeError(
            f"Expected `{name}` of one expert, as each has its own, but got a DenoiserExperts: `experts[i].{name}`."
        )


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*args, **kwargs) -> None:
        raise ValueError(
            f"Expected one expert to be named for `{name}`, as adapters belong to one model, but got a DenoiserExperts: call "
            f"`experts[i].{name}(…)`."
        )

    return refuse


def _is_common(value: Any, values: list[Any]) -> bool:
    if isinstance(value, torch.Tensor) or callable(value):
        return False
    return all(type(each) is type(value) and each == value for each in values)
