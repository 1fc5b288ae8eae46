"""The method `prompts`: prompts for a frozen transformer (DMP, https://arxiv.org/abs/2405.17825)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from ...intervals import NoiseIntervals
from ...plugins import PromptPatch
from ...saving.whole import written_whole
from ..denoiser import Prediction, TextDenoiser
from ..prompted import PromptedTransformer, balancing_weights, gate_learning_rates
from ..recipe import TrainingRecipe
from .source import SourcePipeline

if TYPE_CHECKING:
    from .arguments import TextToImageArguments

FOLDER = "patch"  # in `output_dir`
GATE = "linear"


class PromptedDenoiser(TextDenoiser):
    """
    Calls a transformer with prompts as its pipeline does, and returns the losses that balance the prompts, too.

    Args:
        patch ([`PromptPatch`]): The prompts, attached to the transformer.
        arguments: Those of [`TextDenoiser`].
    """

    def __init__(self, patch: PromptPatch, *arguments: Any):
        super().__init__(*arguments)
        self._gates: Any = None
        patch.register_forward_hook(self._keep_gates)

    def _keep_gates(self, patch: nn.Module, args: tuple, gates: Any) -> None:
        self._gates = gates

    def __call__(
        self,
        model: nn.Module,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
        expert: int | None = None,
    ) -> Prediction:
        """See [`Denoiser`]."""
        output: BaseOutput = super().__call__(model, x_t, timesteps, conditions, expert)
        gates, self._gates = self._gates, None
        for name in ("importance_loss", "load_loss"):
            if gates is not None and gates.get(name) is not None:
                output[name] = gates[name]
        return output  # type: ignore[return-value]


def train_prompts(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """Prompts with a gate; see [`TrainingMethod`]."""
    patch = PromptPatch.for_transformer(
        source.denoiser,
        num_prompts=args.num_prompts,
        depth=args.depth,
        mode=args.prompt_mode,
        gate=GATE,
        topk=args.topk,
        base_model_name_or_path=source.name,
    )
    patch.attach(source.denoiser)

    def save_to(model: nn.Module, folder: Path) -> None:
        with written_whole(folder) as unfinished:
            patch.save_pretrained(unfinished)

    weights = balancing_weights(args, GATE)
    recipe = TrainingRecipe(
        denoiser=PromptedDenoiser(patch, source.family.call, source.denoiser, source.num_train_timesteps),
        learning_rates=gate_learning_rates(args, patch),
        auxiliary_weights=lambda step: weights,
        save_to=save_to,
        saved_name=FOLDER,
    )
    return PromptedTransformer(patch), recipe
