"""What `--method` of a text-to-image training can be: one record per method.

A method says what of the denoiser is trained, how that is saved, and which options it has. A new one is a record more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ...intervals import NoiseIntervals
from ..arguments import PromptArguments, RoutingArguments
from ..recipe import TrainingRecipe
from .lora import train_lora, train_lora_experts
from .option_groups import IntervalArguments, LoraArguments
from .prompts import train_prompts
from .routing import train_routing
from .source import SourcePipeline
from .wholes import train_denoiser_experts, train_full

if TYPE_CHECKING:
    from .arguments import TextToImageArguments


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """
    One way to train the denoiser of a text-to-image pipeline.

    Args:
        prepare (`Callable`): From the arguments, the pipeline and, where there are experts, their intervals, to the module that
            is trained, which is called as the denoiser is, and the recipe. The recipe says how it is saved (`save_to`,
            `saved_name`), and what else the method does in its own way; the rest is filled in.
        groups (`tuple[type, ...]`): The dataclasses of options that this method reads; options of others are refused.
        trains_weights (`bool`): Whether the denoiser's own weights are trained, which are then in float32. Otherwise they are
            frozen, and in the precision of the training.
        can_be_published (`bool`): Whether `push_to_hub` knows what it saves; pipelines of Diffusers' own classes upload themselves.
    """

    prepare: (
        "Callable[[TextToImageArguments, SourcePipeline, NoiseIntervals | None], tuple[nn.Module, TrainingRecipe]]"
    )
    groups: tuple[type[Any], ...] = ()
    trains_weights: bool = False
    can_be_published: bool = True

    @property
    def has_experts(self) -> bool:
        """Whether it trains experts of noise intervals."""
        return IntervalArguments in self.groups


METHODS: Mapping[str, TrainingMethod] = {
    "lora": TrainingMethod(prepare=train_lora, groups=(LoraArguments,)),
    "lora_experts": TrainingMethod(prepare=train_lora_experts, groups=(LoraArguments, IntervalArguments)),
    "denoiser_experts": TrainingMethod(
        prepare=train_denoiser_experts, groups=(IntervalArguments,), trains_weights=True, can_be_published=False
    ),
    "full": TrainingMethod(prepare=train_full, trains_weights=True, can_be_published=False),
    "prompts": TrainingMethod(prepare=train_prompts, groups=(PromptArguments,)),
    "routing": TrainingMethod(
        prepare=train_routing, groups=(RoutingArguments,), trains_weights=True, can_be_published=False
    ),
}
