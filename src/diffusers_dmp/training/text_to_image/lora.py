"""The methods `lora` and `lora_experts`: one LoRA for all noise levels, or one for each interval of them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.training_utils import cast_training_params
from torch import nn

from ...intervals import NoiseIntervals
from ...plugins.lora_experts import LoraExperts
from ...plugins.lora_targets import lora_targets
from ..adapted import LoraDenoiser
from ..recipe import TrainingRecipe
from .option_groups import LoraArguments
from .source import SourcePipeline
from .targets import lora_targets_of

if TYPE_CHECKING:
    from .arguments import TextToImageArguments

FOLDER = "loras"  # in `output_dir`
SINGLE_NAME = "pytorch_lora_weights"  # of the file that `load_lora_weights` looks for


def train_lora(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """One LoRA; see [`TrainingMethod`]."""
    add_loras(source.denoiser, args, [SINGLE_NAME], [SINGLE_NAME], [SINGLE_NAME])

    def save_to(model: nn.Module, folder: Path) -> None:
        everything = NoiseIntervals.uniform(1, source.num_train_timesteps)
        experts = LoraExperts([SINGLE_NAME], everything).attach(source.pipeline)
        experts.save_pretrained(folder)
        experts.detach()

    return LoraDenoiser(source.denoiser, [SINGLE_NAME]), TrainingRecipe(save_to=save_to, saved_name=FOLDER)


def train_lora_experts(
    args: "TextToImageArguments", source: SourcePipeline, intervals: NoiseIntervals | None
) -> tuple[nn.Module, TrainingRecipe]:
    """
    One LoRA for each interval; see [`TrainingMethod`].

    With `--expert i`, all of them are there, and one is trained and saved, with a `lora_experts.json` that names all of them: the
    folders of several machines need only be copied together.
    """
    assert intervals is not None  # a method with `IntervalArguments`
    names = [f"expert_{expert}" for expert in range(intervals.num_experts)]
    trained = names if args.single_expert is None else [names[args.single_expert]]
    experts = LoraExperts(names, intervals)
    for target in lora_targets(source.pipeline, experts.adapters, intervals):
        add_loras(target.denoiser, args, names, target.names, trained)
    experts.attach(source.pipeline)
    recipe = TrainingRecipe(
        passes_expert=False,
        save_to=lambda model, folder: experts.save_pretrained(folder, trained),
        saved_name=FOLDER if args.single_expert is None else f"../{FOLDER}",
    )
    return LoraDenoiser(source.called, trained), recipe


def add_loras(
    denoiser: nn.Module, args: LoraArguments, names: Sequence[str], owned: Sequence[str], trained: Sequence[str]
) -> None:
    """
    Put LoRA into a denoiser, in float32, which change nothing before they are trained.

    Args:
        denoiser (`nn.Module`): The denoiser, which requires no gradients.
        args ([`LoraArguments`]): For ranks, α, dropout and target modules.
        names (`Sequence[str]`): The names of all experts, that for the least noise first.
        owned (`Sequence[str]`): Those that belong to this denoiser.
        trained (`Sequence[str]`): Those that require gradients.

    Raises:
        ValueError: if a target module does not exist.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.functional import set_requires_grad

    target_modules = lora_targets_of(denoiser, args.target_modules)
    for name, rank in zip(names, args.expert_ranks(len(names)), strict=True):
        if name not in owned:
            continue
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if args.lora_alpha is None else args.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=args.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=target_modules,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that of the expert before
            if isinstance(denoiser, PeftAdapterMixin):
                denoiser.add_adapter(config, adapter_name=name)
            else:
                inject_adapter_in_model(config, denoiser, name)
    set_requires_grad(denoiser, list(owned), False)
    set_requires_grad(denoiser, [name for name in owned if name in trained], True)
    cast_training_params(denoiser, torch.float32)
    denoiser.eval()
