"""What is in the way of CUDA graphs: hooks that move weights, or keep tensors from one call to the next."""

from typing import Any

from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import nn

OFFLOADING = "a graph reads weights at fixed addresses, and offloading moves them"
CACHE = "its cache keeps tensors of earlier steps, which the next replay of a graph overwrites"


def obstacle_to_graphs(denoiser: nn.Module) -> str | None:
    """
    Find what is in the way of CUDA graphs: hooks that move weights, or keep tensors from one call to the next.

    Args:
        denoiser (`nn.Module`): The denoiser.

    Returns:
        `str`: What is wrong with it, as the end of a sentence; None if there is nothing.
    """
    if any(map(_is_offloaded, denoiser.modules())):
        return OFFLOADING
    return CACHE if any(map(_has_cache, denoiser.modules())) else None


def moves_layers(denoiser: nn.Module) -> bool:
    """
    Tell whether Accelerate moves the layers one by one, as for `enable_sequential_cpu_offload`: each would be a graph of its own.

    Args:
        denoiser (`nn.Module`): The denoiser.
    """
    return any(_loads_weights(hook) for module in denoiser.modules() for hook in _accelerates_hooks(module))


def _is_offloaded(module: nn.Module) -> bool:
    moves = any(isinstance(hook, CpuOffload) or _loads_weights(hook) for hook in _accelerates_hooks(module))
    return moves or any("group_offloading" in name for name in _diffusers_hooks(module))


def _loads_weights(hook: Any) -> bool:
    return isinstance(hook, AlignDevicesHook) and hook.offload


def _accelerates_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", (hook,)))  # several are one with a list


def _has_cache(module: nn.Module) -> bool:
    # also one that a function such as `apply_first_block_cache` put there
    return any(getattr(hook, "_is_stateful", False) for hook in _diffusers_hooks(module).values())


def _diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    # private to Diffusers, which tells only of whole models what was enabled by their own methods
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
