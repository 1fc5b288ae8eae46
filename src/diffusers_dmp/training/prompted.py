"""Prompts in training, for a transformer that is frozen."""

from torch import nn

from ..plugins import PromptPatch
from .adapted import AdaptedDenoiser
from .arguments import PromptArguments


class PromptedTransformer(AdaptedDenoiser):
    """
    A transformer of which the attached prompts are trained and nothing else; see [`AdaptedDenoiser`].

    Args:
        patch ([`PromptPatch`]): Attached to its transformer, which should be in eval mode on the device of the training.

    Raises:
        ValueError: if `patch` is not attached.
    """

    def __init__(self, patch: PromptPatch):
        if patch.transformer is None:
            raise ValueError("Expected `patch` to be attached to a transformer, but got one that is not.")
        super().__init__(patch.transformer)
        self.patch = patch

    @property
    def transformer(self) -> nn.Module:
        """The transformer that the prompts are attached to."""
        return self.denoiser


def gate_learning_rates(args: PromptArguments, patch: PromptPatch) -> dict[str, float]:
    """The learning rates of a [`PromptedTransformer`]'s parameters that have one of their own: those of the gate."""
    return {f"patch.{name}": args.gate_learning_rate for name, _ in patch.named_parameters() if name != "prompts"}


def balancing_weights(args: PromptArguments, gate: str) -> dict[str, float]:
    """The weights of the balancing losses that prompts with such a gate have, by their names in the output."""
    if gate == "none":
        return {}
    weights = {"importance_loss": args.importance_loss_weight}
    return weights | {"load_loss": args.load_loss_weight} if args.topk < 1 else weights
