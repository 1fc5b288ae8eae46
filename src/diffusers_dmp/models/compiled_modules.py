"""What PyTorch does not tell about compiling in public: whether a module is compiled, and how many graphs it may have."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Where `nn.Module.compile` puts what is called in place of a module. Private to PyTorch, which has no public way to ask whether a
# module is compiled, nor to do anything around a compiled call in place.
COMPILED_CALL = "_compiled_call_impl"


def is_compiled_in_place(module: nn.Module) -> bool:
    """
    Tell whether `module.compile()` was called, as Diffusers' `compile_repeated_blocks` does for each block.

    Args:
        module (`nn.Module`): The module.
    """
    return getattr(module, COMPILED_CALL, None) is not None


def has_compiled_parts(network: nn.Module) -> bool:
    """
    Tell whether a network or any part of it is compiled, in whichever way.

    Args:
        network (`nn.Module`): The network.
    """
    return any(
        is_compiled_in_place(part)
        or hasattr(part, "_orig_mod")  # `torch.compile(part)`
        or getattr(part, "is_compiled", False)  # the models of this package
        for part in network.modules()
    )


@contextmanager
def at_least_graphs(number: int) -> Iterator[None]:
    """
    Let PyTorch make so many graphs of a function, while the context lasts. With more it says so, and runs the function eagerly.

    Args:
        number (`int`): PyTorch's own limit of 8 stays if it is higher.
    """
    import torch._dynamo.config as config  # slow, and needed only here

    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    with config.patch({name: max(getattr(config, name), number)}):  # type: ignore[attr-defined]
        yield
