"""Compilation of the model that is trained: its repeated blocks, one graph for all of them, or else the whole model.

What only looks (validation, samples) runs eagerly: its batches have other sizes and no gradients, each of which would be compiled
by itself.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from ..models.compilation import in_one_line
from ..models.compiled_modules import at_least_graphs
from .adapted import AdaptedDenoiser
from .utilisation import synchronise

BACKEND = "inductor"
MAX_VARIANTS = 4  # of repeated blocks, each of which is compiled by itself
MIN_SHARE = 0.5  # of the weights, that are in repeated blocks
GRAPHS_PER_EXPERT = 8  # for several shapes of a batch; PyTorch's own limit


def check_compilation(accelerator: Accelerator, model: nn.Module) -> None:
    """
    Check that a model can be compiled here, and that only one of two ways is chosen.

    Args:
        accelerator (`Accelerator`): For the device, and for Accelerate's own way.
        model (`nn.Module`): See [`compile_model`].

    Raises:
        ValueError: if there is no compiler, if Accelerate compiles, or if a model is to be sharded that is compiled as a whole.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise ValueError(
            "Expected either `compile` or Accelerate's `--dynamo_backend`, which compiles the whole model, but got true and "
            f"{backend.value.lower()}."
        )
    denoiser = denoiser_of(model)
    if accelerator.is_fsdp2 and not repeated_blocks(denoiser):
        raise ValueError(
            f"Expected `compile` to be false for a {type(denoiser).__name__} with FSDP2, which shards what would be one graph, but "
            "got true."
        )
    check_compiler(accelerator.device)


def check_compiler(device: torch.device) -> None:
    """
    Check, by compiling something small, that there is a compiler for a device.

    Args:
        device (`torch.device`): The device to compute on.

    Raises:
        ValueError: if there is none, or it does not work.
    """
    x = torch.ones(8, device=device)
    try:
        torch.compile(lambda x: x.sin() + 1, backend=BACKEND)(x)
        synchronise(device)
    except Exception as error:  # of the compiler, of several classes
        needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise ValueError(
            f"Expected a compiler for `compile` on {device.type}, {needed}, but got: {in_one_line(error)}"
        ) from error


def compile_model(model: nn.Module) -> None:
    """
    Compile a model in place, when it is next called; the names of its weights stay.

    Repeated blocks are compiled where they have most of the weights and do not differ much, as those of transformers: all of them
    then share one graph. Of a UNet, whose layers differ in width, the whole is compiled.

    Args:
        model (`nn.Module`): The model to train, or what stands for a frozen one, before `accelerator.prepare`.
    """
    denoiser = denoiser_of(model)
    for module in repeated_blocks(denoiser) or [denoiser]:
        nn.Module.compile(module, backend=BACKEND)


def denoiser_of(model: nn.Module) -> nn.Module:
    """The denoiser that is called: the model itself, or the frozen one beside what is trained."""
    return model.denoiser if isinstance(model, AdaptedDenoiser) else model


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """
    The blocks to compile, as the denoiser's class names them to Diffusers; none if it is better compiled as a whole.

    Args:
        denoiser (`nn.Module`): The denoiser.
    """
    names = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    variants = {(type(block), tuple(tuple(each.shape) for each in block.parameters())) for block in blocks}
    in_blocks = sum({id(each): each.numel() for block in blocks for each in block.parameters()}.values())
    in_all = sum(each.numel() for each in denoiser.parameters())
    return blocks if len(variants) <= MAX_VARIANTS and in_blocks >= MIN_SHARE * in_all else []


def eagerly(is_compiled: bool) -> AbstractContextManager[Any]:
    """A context in which a model that was compiled runs as if it were not; nothing is compiled again afterwards."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def graphs_for_experts(is_compiled: bool, num_experts: int) -> AbstractContextManager[Any]:
    """
    A context in which a block may have graphs for each expert, of which adapters need one each.

    Past PyTorch's limit, it would go on eagerly with no more than a warning among others.

    Args:
        is_compiled (`bool`): Whether there is anything to do.
        num_experts (`int`): E.
    """
    return at_least_graphs(GRAPHS_PER_EXPERT * num_experts) if is_compiled else nullcontext()


class CompiledSteps:
    """Tells which steps have compiled something, and how long they took."""

    def __init__(self, now: float):
        self.num_graphs, self.ended = _num_graphs(), now

    def end(self, now: float) -> tuple[int, float]:
        """
        End a step.

        Args:
            now (`float`): The time in seconds, on the clock that the first step began at.

        Returns:
            The number of graphs that the step compiled, and the seconds since the last one's end.
        """
        num_graphs, ended = self.num_graphs, self.ended
        self.num_graphs, self.ended = _num_graphs(), now
        return self.num_graphs - num_graphs, now - ended


def _num_graphs() -> int:
    """The number of graphs that this process has compiled; PyTorch has no public counter."""
    from torch._dynamo.utils import counters  # slow

    return counters["stats"]["unique_graphs"]
