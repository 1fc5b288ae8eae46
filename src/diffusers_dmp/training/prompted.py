"""Prompts in training, for a transformer that is frozen."""

from typing import Any

from torch import nn

from ..plugins import PromptPatch


class PromptedTransformer(nn.Module):
    """
    A transformer of which the attached prompts are trained and nothing else. It is called as the transformer is.

    Its parameters, its state and its mode are those of the prompts, so that optimiser, averaging, checkpoints and
    communication between processes handle a few megabytes.

    Args:
        patch ([`PromptPatch`]): Attached to its transformer, which should be in eval mode on the device of the training.

    Raises:
        ValueError: if `patch` is not attached.
    """

    def __init__(self, patch: PromptPatch):
        super().__init__()
        if patch.transformer is None:
            raise ValueError("Expected `patch` to be attached to a transformer, but got one that is not.")
        self.patch = patch
        self._transformer = (patch.transformer,)  # in a tuple, so that it is no submodule

    @property
    def transformer(self) -> nn.Module:
        """The transformer that the prompts are attached to."""
        return self._transformer[0]

    @property
    def config(self) -> Any:
        """The configuration of the transformer."""
        return self.transformer.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the transformer's `forward`."""
        return self.transformer(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """See [`ModelMixin.enable_gradient_checkpointing`]."""
        self.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
