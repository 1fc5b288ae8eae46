"""Adapters in training, for a denoiser that is frozen."""

from collections.abc import Sequence
from typing import Any

from torch import nn


class AdaptedDenoiser(nn.Module):
    """
    A denoiser of which adapters are trained and nothing else. It is called as the denoiser is.

    Its parameters, its state and its mode are those of its submodules, which are the adapters, so that optimiser, averaging,
    checkpoints and communication between processes handle a few megabytes.

    Args:
        denoiser (`nn.Module`): The denoiser, which should be in eval mode on the device of the training.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self._denoiser = (denoiser,)  # in a tuple, so that it is no submodule

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser that the adapters belong to."""
        return self._denoiser[0]

    @property
    def config(self) -> Any:
        """The configuration of the denoiser."""
        return self.denoiser.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the denoiser's `forward`."""
        return self.denoiser(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """See [`ModelMixin.enable_gradient_checkpointing`]."""
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]


class LoraDenoiser(AdaptedDenoiser):
    """
    A denoiser of which LoRA are trained and nothing else.

    Args:
        denoiser (`nn.Module`): The denoiser, into which PEFT has put adapters.
        names (`list[str]`): Those that are trained.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]):
        super().__init__(denoiser)
        self.adapters = nn.Module()
        for path, layer in denoiser.named_modules():
            for attribute in (*getattr(layer, "adapter_layer_names", ()), "lora_dropout"):
                parts = getattr(layer, attribute, {})
                for name in names:
                    if isinstance(parts, nn.ModuleDict) and name in parts:
                        _place(self.adapters, [*path.split("."), attribute, name], parts[name])


def _place(root: nn.Module, path: Sequence[str], module: nn.Module) -> None:
    """Make a module a submodule, under the same name that it has in the denoiser."""
    *parents, name = path
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
