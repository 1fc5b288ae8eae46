"""Trainings of several experts, each a model of its own in a folder of its own: one of them, or all in turn."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from .arguments import LoopArguments
from .checkpoints import expect_no_checkpoints
from .data.loop_data import LoopData
from .objectives.objective import Objective
from .recipe import TrainingRecipe
from .resuming import CONTENTS, differing_arguments, recorded_arguments, resolved_arguments
from .summary import SUMMARY_NAME
from .trainer import make_accelerator, train

logger = logging.getLogger(__name__)

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
    args: LoopArguments,
    data: LoopData,
    folders: Sequence[Path],
    experts: Sequence[int],
    prepare: Callable[[int], ExpertTraining],
    find_unused_parameters: bool = False,
) -> None:
    """
    Train experts one after another; those that an interrupted run has finished are skipped when it is resumed.

    Args:
        args ([`LoopArguments`]): Everything that can be set; `output_dir` is replaced by the expert's folder.
        data ([`LoopData`]): What they are trained on.
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
        if args.resume_from_checkpoint == "latest" and is_finished(own_args):
            logger.warning("Expert %d in %s is finished: skipped.", expert, folders[expert])
            continue
        set_seed(args.seed)  # so that its first weights do not depend on the experts that were trained before
        own = prepare(expert)
        accelerator = make_accelerator(own_args, find_unused_parameters)
        train(accelerator, own_args, own.model, own.objective, data, own.recipe)


def is_finished(args: LoopArguments) -> bool:
    """Whether a training with these arguments, but for those that may change, has ended in `args.output_dir`."""
    recorded, now = recorded_arguments(Path(args.output_dir)), resolved_arguments(args)
    return (
        recorded is not None
        and Path(args.output_dir, SUMMARY_NAME).is_file()
        and all(recorded.get(name) == now[name] for name in ("max_train_steps", *CONTENTS))
        and not differing_arguments(recorded, now, args)
    )
