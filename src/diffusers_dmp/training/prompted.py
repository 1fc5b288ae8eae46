"""A patch in training."""

from torch import nn

from ..plugins import PromptPatch


class PatchedTransformer(nn.Module):
    """
    A transformer of which a patch is trained and nothing else: its parameters, its state and its mode are the patch's, so
    that optimiser, averaging, checkpoints and processes deal with a few megabytes. Called as the transformer is.

    Args:
        patch ([`PromptPatch`]): Attached to its transformer, which should be in eval mode on the device of the training.
    """

    def __init__(self, patch: PromptPatch):
        super().__init__()
        self.patch = patch
        self._transformer = (patch.transformer,)  # in a tuple it is no submodule

    @property
    def transformer(self) -> nn.Module:
        """What the patch is attached to."""
        return self._transformer[0]

    @property
    def config(self):
        """The transformer's."""
        return self.transformer.config

    def forward(self, *args, **kwargs):
        return self.transformer(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """See [`ModelMixin.enable_gradient_checkpointing`]."""
        self.transformer.enable_gradient_checkpointing()
