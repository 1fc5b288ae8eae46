"""Which adapters of PEFT the layers of a model use: switched in a tenth of a millisecond, and put back as they were.

PEFT's and Diffusers' `set_adapters` also change which adapters require gradients. Here, nothing but what the layers' forward pass
reads is set: the names of the active adapters and their scales.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

# where a module keeps the function that checkpoints a part of it: models of Diffusers, and PyTorch's `CheckpointWrapper`
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


class AdapterSwitch:
    """
    Switches the adapters that a model uses.

    Args:
        model (`nn.Module`): A model with layers of PEFT.
        choices (`list[tuple[tuple[str, float], ...]]`): The adapters to choose from, with their weights; an empty tuple is the
            model without adapters.
    """

    def __init__(self, model: nn.Module, choices: Sequence[tuple[tuple[str, float], ...]]):
        self._model = model
        self._layers = adapter_layers(model)
        self._names = [[name for name, _ in choice] for choice in choices]
        self._scales = [
            [
                (layer.scaling, name, _scale(layer, name, weight))
                for name, weight in choice
                for layer in self._layers
                if name in adapters_of_layer(layer)
            ]
            for choice in choices
        ]
        self._configs = _configs(model)
        self.look()
        # the first layer of the model and of each adapter, which are looked at before each pass
        first = {name: next(each for each in self._layers if name in adapters_of_layer(each)) for name in self.names}
        self._watched = list(dict.fromkeys([*self._layers[:1], *first.values()]))
        self._active = [layer._active_adapter for layer in self._watched]
        self._scalings = {name: layer.scaling for name, layer in first.items()}
        self._scaled = {name: layer.scaling[name] for name, layer in first.items()}
        self.current: int | None = None

    @property
    def names(self) -> list[str]:
        """The adapters that occur in the choices."""
        return list(dict.fromkeys(name for names in self._names for name in names))

    def look(self) -> None:
        """Note what the model uses now, for [`~AdapterSwitch.put_back`]."""
        self._found = [(layer._active_adapter, dict(layer.scaling)) for layer in self._layers]

    def use(self, choice: int) -> None:
        """
        Use the adapters of a choice, in all layers.

        Args:
            choice (`int`): Its index.
        """
        if choice == self.current:
            return
        self.current = choice
        names = self._names[choice]
        for layer in self._layers:
            # private to PEFT, whose public setter changes `requires_grad` of all adapters; the attribute's own setter, that of
            # modules, takes thirty times as long
            vars(layer)["_active_adapter"] = names
        for scaling, name, scale in self._scales[choice]:
            scaling[name] = scale
        self._active = [names] * len(self._watched)
        for name in names:
            self._scaled[name] = self._scalings[name][name]

    def keep_scales(self) -> None:
        """Set the scales of the choice again, after a pass: a `scale` of 0 in a pipeline's call leaves them with the weight 1."""
        if self.current is not None and not self._has_own_scales:
            for scaling, name, scale in self._scales[self.current]:
                scaling[name] = scale

    def put_back(self) -> None:
        """Use the adapters that the model used when it was looked at, except in layers where others have chosen since."""
        if self.current is None:
            return
        names, self.current = self._names[self.current], None
        for layer, (active, scaling) in zip(self._layers, self._found):
            if layer._active_adapter is names:
                layer._active_adapter = active
                layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})

    @property
    def is_untouched(self) -> bool:
        """Whether nobody else has loaded, deleted, activated, scaled or fused adapters since."""
        configs = _configs(self._model)
        return (
            len(configs) == len(self._configs)
            and all(config is other for config, other in zip(configs, self._configs))
            and all(layer._active_adapter is active for layer, active in zip(self._watched, self._active))
            and not any(layer.merged_adapters for layer in self._watched)
            and self._has_own_scales
        )

    @property
    def _has_own_scales(self) -> bool:
        return all(_is_same_scale(self._scalings[name].get(name), scale) for name, scale in self._scaled.items())

    @property
    def frozen_names(self) -> list[str]:
        """Those of the adapters that require no gradients, if others do."""
        trained = {
            name
            for layer in self._layers
            for attribute in layer.adapter_layer_names
            for name, part in getattr(layer, attribute, {}).items()
            if any(parameter.requires_grad for parameter in _parameters(part))
        }
        return [name for name in self.names if name not in trained] if trained else []

    def bind_checkpoints(self) -> None:
        """
        Let gradient checkpointing compute each part of a pass again with the adapters of that pass.

        Between a pass and its backward pass, others may run with other adapters. This wraps the functions that checkpoint parts of
        the model, also those that were set in the meantime.
        """
        for module in self._modules():
            for name in _CHECKPOINTS:
                function = vars(module).get(name)
                if function is not None and not isinstance(function, _CheckpointWithAdapters):
                    setattr(module, name, _CheckpointWithAdapters(self, function))

    def remove(self) -> None:
        """Put everything back as it was, except for what others have changed since."""
        for module in self._modules():
            for name in _CHECKPOINTS:
                function = vars(module).get(name)
                if isinstance(function, _CheckpointWithAdapters):
                    setattr(module, name, function.checkpoint)
        self.put_back()

    def _modules(self) -> Iterator[nn.Module]:
        """The modules of the model but those in its layers of PEFT: ten times faster than `modules()`."""
        remaining = [self._model]
        layers = set(self._layers)
        while remaining:
            module = remaining.pop()
            yield module
            if module not in layers:
                remaining.extend(child for child in module._modules.values() if child is not None)


class _CheckpointWithAdapters:
    """A function that checkpoints a part of a model, which is computed again with the adapters of its first time."""

    def __init__(self, switch: AdapterSwitch, checkpoint: Callable):
        self.switch = switch
        self.checkpoint = checkpoint

    def __call__(self, function: Callable, *args, **kwargs) -> Any:
        if torch.compiler.is_compiling():  # a graph does not look at the layers again
            return self.checkpoint(function, *args, **kwargs)
        return self.checkpoint(_WithAdapters(self.switch, function), *args, **kwargs)


class _WithAdapters:
    """A part of a model, computed with the adapters that the model uses now."""

    def __init__(self, switch: AdapterSwitch, function: Callable):
        self.switch = switch
        self.function = function
        self.choice = switch.current

    def __call__(self, *args, **kwargs) -> Any:
        if self.choice is None:  # a part that is called by itself, before the first pass
            return self.function(*args, **kwargs)
        is_removed = self.switch.current is None
        if is_removed:
            self.switch.look()  # others may have chosen since
        self.switch.use(self.choice)  # and leave it at that: the next pass chooses its own
        try:
            return self.function(*args, **kwargs)
        finally:
            if is_removed:
                self.switch.put_back()


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of PEFT in a model."""
    return [module for module in model.modules() if hasattr(module, "adapter_layer_names")]


def _scale(layer: Any, name: str, weight: float) -> float:
    """The scale of an adapter in a layer with a weight: weight · alpha / r, or / √r."""
    before = layer.scaling[name]
    layer.set_scale(name, weight)
    scale, layer.scaling[name] = layer.scaling[name], before
    return scale


def _is_same_scale(scale: Any, other: Any) -> bool:
    # up to rounding, as Diffusers scales before each pass and divides again after it; PEFT may have tensors here
    return scale is other or (isinstance(scale, float) and isinstance(other, float) and math.isclose(scale, other))


def adapters_of_layer(layer: Any) -> set[str]:
    """Return the names of the adapters in a layer of PEFT."""
    return {name for names in layer.adapter_layer_names for name in getattr(layer, names, {})}


def _parameters(part: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [part] if isinstance(part, nn.Parameter) else list(part.parameters())


def _configs(model: nn.Module) -> tuple:
    """The configurations of the adapters in a model: other objects after any of them has been loaded or deleted."""
    return tuple(getattr(model, "peft_config", {}).values())
