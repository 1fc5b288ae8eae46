"""Trainings of several experts, each a model of its own in a folder of its own: one of them, or all in turn."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .arguments import SharedTrainingArguments
from .checkpoints import expect_no_checkpoints
from .data.training_data import TrainingData
from .objectives.objective import Objective
from .recipe import TrainingRecipe
from .trainer import make_accelerator, train

# one expert alone is not uploaded: the entry point uploads them together
NOT_PUSHED: dict[str, Any] = {
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": False,
    "hub_license": None,
}


@dataclasses.dataclass(kw_only=True)
class ExpertTraining:
    """
    What one expert's training has of its own.

    Args:
        model (`nn.Module`), objective ([`Objective`]), recipe ([`TrainingRecipe`]): See [`train`].
    """

    model: nn.Module
    objective: Objective
    recipe: TrainingRecipe


def train_experts(
    args: SharedTrainingArguments,
    data: TrainingData,
    folders: Sequence[Path],
    experts: Sequence[int],
    prepare: Callable[[int], ExpertTraining],
    find_unused_parameters: bool = False,
) -> None:
    """
    Train experts one after another.

    Args:
        args ([`SharedTrainingArguments`]): Everything that can be set; `output_dir` is replaced by the expert's folder.
        data ([`TrainingData`]): What they are trained on.
        folders (`Sequence[Path]`): The folder of each expert there is.
        experts (`Sequence[int]`): The experts to train.
        prepare (`Callable[[int], ExpertTraining]`): Makes what an expert's training has of its own, when its turn comes.
        find_unused_parameters (`bool`): See [`make_accelerator`].

    Raises:
        ValueError: before any of them is trained, if the folder of one of them holds checkpoints of an earlier run and
            `resume_from_checkpoint` does not ask for them.
    """
    if args.resume_from_checkpoint is None:
        for expert in experts:
            expect_no_checkpoints(folders[expert])
    for expert in experts:
        own_args = dataclasses.replace(args, output_dir=str(folders[expert]), **NOT_PUSHED)
        own = prepare(expert)
        accelerator = make_accelerator(own_args, find_unused_parameters)
        train(accelerator, own_args, own.model, own.objective, data, own.recipe)
