"""Checks that timesteps lie within the training schedule that a model was made for.

Timesteps t count the T steps of the training schedule: t = 0 is almost clean, t = T - 1 almost pure noise. A flow-matching
scheduler (https://arxiv.org/abs/2210.02747) has t = σ·T and starts at exactly t = T.
"""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin


def check_timesteps(timesteps: torch.Tensor, num_train_timesteps: int) -> None:
    """
    Check that timesteps lie in [0, T), or in [0, T] if they are floats.

    Only CPU tensors are checked: to read a tensor on an accelerator would make the CPU wait for it at every step. The
    pipelines therefore check their whole schedule once, on the CPU.

    Args:
        timesteps (`torch.Tensor` of any shape): Integer or float timesteps.
        num_train_timesteps (`int`): T.

    Raises:
        ValueError: if a timestep on the CPU lies outside.
    """
    if not timesteps.is_cpu or torch.compiler.is_compiling() or timesteps.numel() == 0:
        return
    low, high = timesteps.min(), timesteps.max()
    if low < 0 or high > num_train_timesteps or (high == num_train_timesteps and not timesteps.is_floating_point()):
        raise ValueError(
            f"Expected `timestep` to lie within the {num_train_timesteps} training timesteps, "
            f"but got values from {low.item()} to {high.item()}."
        )


def check_train_timesteps(scheduler: SchedulerMixin, num_train_timesteps: int) -> None:
    """
    Check that a scheduler and a model have the same number of training timesteps.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        num_train_timesteps (`int`): T of the model.

    Raises:
        ValueError: if the numbers differ.
    """
    # a scheduler without the last timesteps, those of pure noise, is one for a model of all of them
    scheduler_timesteps = scheduler.config.get("model_train_timesteps") or scheduler.config.get("num_train_timesteps")
    if scheduler_timesteps != num_train_timesteps:
        raise ValueError(
            f"Expected the scheduler's `num_train_timesteps` to be the model's {num_train_timesteps}, "
            f"but got a {type(scheduler).__name__} with {scheduler_timesteps}."
        )
