"""Adapters (LoRA) in a Remix-DiT: of the layers that its experts share, but not of those that are mixtures of bases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..saving.adapters import adapter_names, has_adapters
from .dit.model import DiTModel
from .remix_layers import BasisLinear


class RemixAdaptersMixin(DiTModel):
    """Refuse in words what PEFT cannot adapt in a [`RemixDiTModel`], and leave nothing of it in the model."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """
        Add an adapter to layers that the experts share; see [`PeftAdapterMixin.add_adapter`].

        Raises:
            ValueError: if it is to adapt a layer that is a mixture of bases.
        """
        with self._refusing_adapted_bases():
            super().add_adapter(adapter_config, adapter_name)

    def load_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """
        Load a LoRA of layers that the experts share; see [`PeftAdapterMixin.load_lora_adapter`].

        Raises:
            ValueError: if it adapts a layer that is a mixture of bases, as the LoRA of a plain DiT does.
        """
        with self._refusing_adapted_bases():
            super().load_lora_adapter(*args, **kwargs)

    @contextmanager
    def _refusing_adapted_bases(self) -> Iterator[None]:
        had_adapters, known = has_adapters(self), adapter_names(self)
        try:
            yield
        except ValueError as error:
            if BasisLinear.__name__ not in str(error):
                raise
            # PEFT puts adapters in one layer after the other, and stops at the first that it does not know
            if not had_adapters:
                self.unload_lora()
            else:  # Diffusers chooses a name where none is given
                self.delete_adapters(sorted(adapter_names(self) - known))
            raise ValueError(
                "Expected an adapter of layers that the experts of a Remix-DiT share, such as 'norm1.linear', but got one of the "
                "blocks' other linear layers, which are mixtures. `bake_expert(i)` makes a plain DiT, which takes it."
            ) from error
