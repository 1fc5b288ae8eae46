"""Training with sharded weights, FSDP2 through Accelerate: each process has a slice of every weight.

FSDP2 shards a model in place, so that the model itself is what all processes call together: a forward pass that one of them
does not make, or makes with other modules, leaves the others waiting. What is saved for inference is put together on the main
process. Checkpoints are Accelerate's sharded ones, of `torch.distributed.checkpoint`; any number of processes resumes them.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType
from torch.distributed.tensor import DTensor

from ..intervals import NoiseIntervals
from .arguments import LoopArguments
from .recipe import TrainingRecipe

WEIGHTS_FOLDER = f"{FSDP_MODEL_NAME}_0"  # of a sharded checkpoint
AVERAGE_FOLDER = "ema_0"


def check_sharding(
    accelerator: Accelerator, args: LoopArguments, model: nn.Module, objective: nn.Module, recipe: TrainingRecipe
) -> None:
    """
    Check that what is trained can be sharded, where Accelerate is asked for that.

    Args:
        accelerator (`Accelerator`): Of all processes.
        args ([`LoopArguments`]): For batches, optimiser and precision.
        model (`nn.Module`): The model, before it is sharded.
        objective (`nn.Module`): Its parameters, if it has any, could not be sharded with the model's.
        recipe ([`TrainingRecipe`]): For the experts, of which every process has to call the same.

    Raises:
        ValueError: if it cannot, or if Accelerate is asked for something else than FSDP2 with sharded checkpoints.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"Expected `fsdp_version` to be 2, but got {plugin.fsdp_version}: set it in Accelerate's configuration."
        )
    if plugin.state_dict_type is not StateDictType.SHARDED_STATE_DICT:
        raise ValueError(
            "Expected `fsdp_state_dict_type` to be SHARDED_STATE_DICT in Accelerate's configuration, but got "
            f"{plugin.state_dict_type.name}."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("Expected `mixed_precision` to be no or bf16 with FSDP2, but got fp16.")
    if args.optimizer != "adamw":
        raise ValueError(f"Expected `optimizer` to be 'adamw' with FSDP2, but got {args.optimizer!r}.")
    if any(parameter.requires_grad for parameter in objective.parameters()):
        raise ValueError(
            "Expected a `weighting` without parameters of its own with FSDP2, which shards one model, but got "
            f"{getattr(args, 'weighting', None)!r}."
        )
    if not isinstance(model, ModelMixin) or recipe.save is not None:
        raise ValueError("Expected a whole model to train with FSDP2, but got parts of one, for which DDP suffices.")
    if recipe.expert_intervals is None or recipe.expert is not None or recipe.expert_batches == "one":
        return
    num_experts = recipe.expert_intervals.num_experts
    micro_batch = args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)
    if recipe.expert_batches == "density" or micro_batch < num_experts:
        raise ValueError(
            f"Expected every micro-batch to have samples of all {num_experts} experts with FSDP2, which wants all processes to "
            f"call the same, but got {micro_batch} samples of {recipe.expert_batches!r} experts; one expert per step does as well."
        )


def set_up_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """
    Tell Accelerate what it has no setting for, before `accelerator.prepare`.

    The blocks that a model's class names become units, of which one is whole at a time. In mixed precision, inputs are not
    rounded: a timestep of 987 would become 988 in bfloat16, and might belong to another expert. Autocasting rounds later.
    """
    plugin = accelerator.state.fsdp_plugin
    if not plugin.transformer_cls_names_to_wrap:
        present = {type(module).__name__ for module in model.modules()}
        named = [*(getattr(model, "_no_split_modules", None) or ()), *(getattr(model, "_repeated_blocks", None) or ())]
        plugin.transformer_cls_names_to_wrap = [name for name in dict.fromkeys(named) if name in present]
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have no values; it takes no memory but that of the buffers."""
    empty = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gathered(accelerator: Accelerator, model: nn.Module, structure: nn.Module) -> nn.Module:
    """
    A sharded model as one that is whole, on the CPU of the main process; every process has to call.

    Args:
        accelerator (`Accelerator`): Of all processes.
        model (`nn.Module`): As `accelerator.prepare` returned it.
        structure (`nn.Module`): What [`without_weights`] made of it before.

    Returns:
        `nn.Module`: The model with its weights in the main process, without them in the others.
    """
    weights = accelerator.get_state_dict(model)
    whole = copy.deepcopy(structure)
    if accelerator.is_main_process:
        whole.load_state_dict(weights, assign=True)
    return whole


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's slice of a tensor; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, or this process's slices of them, which share their memory."""
    return [
        nn.Parameter(local(parameter.detach()), requires_grad=parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for parameter in model.parameters()
    ]


def reshard(model: nn.Module) -> None:
    """
    Let each process have its slices alone again, after forward passes without a backward pass.

    Until then FSDP2 leaves the outermost weights whole, and `model.parameters()` are those.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def equally_often(accelerator: Accelerator, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """
    Give every process as many batches as the one with most, so that all of them make the same forward passes.

    Args:
        accelerator (`Accelerator`): Of all processes.
        batches (`Iterator`): This process's own.

    Returns:
        Each batch, and whether it is a new one: a process without more has its last one again.

    Raises:
        ValueError: in all processes, if one of them has none.
    """
    batch = None
    while True:
        following = next(batches, None)
        batch = batch if following is None else following
        state = torch.tensor([[following is not None, batch is not None]], device=accelerator.device)
        is_left, has_one = (column.tolist() for column in accelerator.gather(state.to(torch.uint8)).unbind(1))
        if not any(is_left):
            return
        if not all(has_one):
            raise ValueError(
                f"Expected at least {accelerator.num_processes} held-out samples for as many processes, but got fewer."
            )
        yield batch, following is not None


def with_all_experts(
    intervals: NoiseIntervals, x_t: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """
    Append a sample in every interval to a batch, so that all processes call all experts.

    Args:
        intervals ([`NoiseIntervals`]): Of E experts.
        x_t (`torch.Tensor` of shape (B, …)), timesteps (`torch.Tensor` of shape (B,)): The batch.
        conditions (`dict[str, Any]`): Its conditions: tensors (B, …), or None.

    Returns:
        The same for B + E samples, of which the first B are the batch.
    """
    rows = [*range(len(x_t)), *[0] * intervals.num_experts]
    is_continuous = timesteps.is_floating_point()
    bounds = zip(intervals.edges, intervals.edges[1:])
    middles = [(low + high) / 2 if is_continuous else math.ceil(low) for low, high in bounds]
    extended = {name: None if value is None else value[rows] for name, value in conditions.items()}
    return x_t[rows], torch.cat([timesteps, timesteps.new_tensor(middles)]), extended


class ShardedAverage(EMAModel):
    """
    The average of a sharded model's weights: each process averages its slices.

    A checkpoint has the average in a folder of its own, in the format of the weights.

    Args:
        accelerator (`Accelerator`): Of all processes.
        model (`nn.Module`): As `accelerator.prepare` returned it.
        decay (`float`): See [`EMAModel`].
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, decay: float):
        super().__init__(local_parameters(model), decay=decay, foreach=True)
        self.model = model
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the slices."""
        return {name: value for name, value in super().state_dict().items() if name != "shadow_params"}

    def to(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the slices lie where those of the model do."""

    def _slices(self) -> dict[str, torch.Tensor]:
        """The average by the parameters' names, as slices of tensors that any number of processes can read."""
        named = self.model.named_parameters()
        return {
            name: DTensor.from_local(
                average, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            )
            if isinstance(parameter, DTensor)
            else average
            for (name, parameter), average in zip(named, self.shadow_params)
        }

    def _save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        torch.distributed.checkpoint.save(self._slices(), checkpoint_id=Path(output_dir, AVERAGE_FOLDER))

    def _load(self, models: list[nn.Module], input_dir: str) -> None:
        # into the slices' own memory
        torch.distributed.checkpoint.load(self._slices(), checkpoint_id=Path(input_dir, AVERAGE_FOLDER))


def expect_same_sharding(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Check that a checkpoint is sharded if and only if the training is.

    Raises:
        ValueError: if not.
    """
    was_sharded = is_sharded_checkpoint(checkpoint)
    if was_sharded != accelerator.is_fsdp2:
        then, now = (("FSDP2" if sharded else "no FSDP2") for sharded in (was_sharded, accelerator.is_fsdp2))
        raise ValueError(
            f"Expected the training to be launched as {checkpoint} was, with {then}, but got {now}; the number of processes "
            "may change."
        )


def is_sharded_checkpoint(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a sharded training."""
    return (checkpoint / WEIGHTS_FOLDER).is_dir()


def load_sharded_weights(module: nn.Module, checkpoint: Path, use_ema: bool) -> None:
    """
    Load the weights of a sharded checkpoint into a module that is whole, in a process of its own.

    Args:
        module (`nn.Module`): As it was trained.
        checkpoint (`Path`): The folder.
        use_ema (`bool`): Load the averaged weights over it, if there are any.

    Raises:
        ValueError: if they are those of another module, or cannot be read.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    folders: dict[str, Any] = {WEIGHTS_FOLDER: {"model": module.state_dict()}}
    if use_ema and (checkpoint / AVERAGE_FOLDER).is_dir():
        folders[AVERAGE_FOLDER] = parameters
    for folder, state in folders.items():
        try:  # into the module's own memory
            torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint / folder, no_dist=True)
        except Exception as error:  # of the reader and of pickle, which have no class in common
            reason = " ".join(str(error).split())
            raise ValueError(
                f"Expected {str(checkpoint)!r} to hold the weights of a {type(module).__name__}, but got {reason}"
            ) from error
