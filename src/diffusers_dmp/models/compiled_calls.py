"""Denoisers that are compiled in place: what calls them, a pipeline of Diffusers too, calls compiled code.

https://docs.pytorch.org/docs/stable/torch.compiler_cudagraph_trees.html
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from .compilation import WITHOUT_GRAPHS, Compilation
from .compiled_modules import COMPILED_CALL, at_least_graphs
from .graph_obstacles import OFFLOADING, moves_layers, obstacle_to_graphs

# How many graphs PyTorch may make of one function. Its own limit of 8 is for all models of a class together: each size of model,
# resolution (the first few), batch of one, and adapter takes one.
MAX_GRAPHS = 256


class CompiledCalls:
    """
    The calls of one denoiser, compiled when they are first made.

    A call that captures or replays a CUDA graph begins a new step, and its output is copied: the next replay overwrites it, and
    multistep schedulers keep the outputs of earlier steps.

    Args:
        function (`Callable`): What is compiled.
        denoiser (`nn.Module`): Whose calls these are.
        compilation ([`Compilation`]): How.
    """

    compiles_calls = True  # see `compilation_of`

    def __init__(self, function: Callable[..., Any], denoiser: nn.Module, compilation: Compilation):
        self.compilation = compilation
        self._function, self._denoiser = function, denoiser
        self._compiled: dict[str | None, Callable[..., Any]] = {}
        self._is_checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser."""
        if torch.compiler.is_compiling():  # as a part of something larger
            return self._function(*args, **kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        # the first on an accelerator: a time may come before it, on the CPU
        sample = next((each for each in tensors if not each.is_cpu), tensors[0] if tensors else torch.empty(0))
        captures = self.compilation.captures_graphs(sample.device)
        # other pipelines offload without asking; to look at all layers takes too long for every step
        if not self._is_checked or getattr(self._denoiser, "is_cache_enabled", False):
            self._check_hooks(captures)
        if self.compilation.is_eager:
            return self._call_eagerly(*args, **kwargs)
        if captures:
            self._begin_step(tuple(sample.shape))
        try:
            output = self._call_compiled(sample.device, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = error
        else:
            return _copied(output) if captures else output
        # outside of `except`, so that an error of the call itself is seen without that of the compiler
        output = self._call_eagerly(*args, **kwargs)
        if self.compilation.options.get("fullgraph"):
            raise reason  # which is what `fullgraph` asks for
        self.compilation.fall_back(type(self._denoiser).__name__, reason)
        return output

    def _check_hooks(self, captures: bool) -> None:
        check_layers_stay([self._denoiser])
        obstacle = obstacle_to_graphs(self._denoiser) if captures else None
        if obstacle is not None:
            raise _obstructed(self._denoiser, obstacle)
        self._is_checked = True

    def _begin_step(self, shape: tuple[int, ...]) -> None:
        self.compilation.note_shape(type(self._denoiser).__name__, shape)
        if not torch.is_grad_enabled():  # PyTorch would forget what backward passes are still to come
            torch.compiler.cudagraph_mark_step_begin()

    def _call_compiled(self, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> Any:
        mode = self.compilation.mode_on(device)
        if mode not in self._compiled:
            self._compiled[mode] = self.compilation.compiled(self._function, mode)
        with at_least_graphs(MAX_GRAPHS):
            return self._compiled[mode](*args, **kwargs)

    def _call_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):  # also parts that were compiled by themselves
            return self._function(*args, **kwargs)


def compile_denoisers(
    denoisers: Iterable[nn.Module], device: torch.device, is_offloaded: bool = False, **arguments: Any
) -> None:
    """
    Compile denoisers in place: what calls them afterwards, a pipeline of Diffusers too, calls compiled code.

    Args:
        denoisers (`Iterable[nn.Module]`): The denoisers, of any class; [`DenoiserExperts`] are their experts.
        device (`torch.device`): Where they compute.
        is_offloaded (`bool`): Whether their pipeline offloads them.
        arguments: Those of [`Compilation`].

    Raises:
        ValueError: if there is no such backend or mode, or CUDA graphs are asked for that are not possible.
    """
    denoisers = list(_denoisers_in(denoisers))
    obstacle = OFFLOADING if is_offloaded else next(filter(None, map(obstacle_to_graphs, denoisers)), None)
    compilation = Compilation(**arguments, obstacle=obstacle)
    compilation.check(device)
    for denoiser in denoisers:
        function, attribute = _compiled_part(denoiser)
        setattr(denoiser, attribute, CompiledCalls(function, denoiser, compilation))
    check_layers_stay(denoisers)


def compilation_of(denoiser: nn.Module) -> Compilation | None:
    """
    Return how a denoiser was compiled by [`compile_denoisers`], or None.

    Args:
        denoiser (`nn.Module`): The denoiser.
    """
    calls = getattr(denoiser, _compiled_part(denoiser)[1])
    # by an attribute, as code that comes with a repository defines other classes: see saving/naming.py
    return calls.compilation if getattr(calls, "compiles_calls", False) else None


def check_no_graphs(denoisers: Iterable[nn.Module], device: torch.device) -> None:
    """
    Check, before weights are offloaded, that they are not those of CUDA graphs.

    Args:
        denoisers (`Iterable[nn.Module]`): The denoisers.
        device (`torch.device`): Where they compute.

    Raises:
        ValueError: if one was compiled with CUDA graphs.
    """
    for denoiser in _denoisers_in(denoisers):
        compilation = compilation_of(denoiser)
        with torch.no_grad():  # as pipelines call it
            if compilation is not None and compilation.captures_graphs(device):
                raise _obstructed(denoiser, OFFLOADING)


def check_layers_stay(denoisers: Iterable[nn.Module]) -> None:
    """
    Let denoisers run eagerly, and say so, if their layers are moved one by one: that cannot be compiled.

    Args:
        denoisers (`Iterable[nn.Module]`): The denoisers.
    """
    for denoiser in _denoisers_in(denoisers):
        compilation = compilation_of(denoiser)
        if compilation is not None and moves_layers(denoiser):
            compilation.fall_back(type(denoiser).__name__, "its layers are offloaded one by one.")


def _obstructed(denoiser: nn.Module, obstacle: str) -> ValueError:
    return ValueError(f"Expected a {type(denoiser).__name__} without CUDA graphs, as {obstacle}; {WITHOUT_GRAPHS}")


def _denoisers_in(denoisers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Denoisers, with the experts of those that consist of several."""
    for denoiser in denoisers:
        experts = getattr(denoiser, "experts", None)
        yield from experts if isinstance(experts, nn.ModuleList) else (denoiser,)


def _compiled_part(denoiser: Any) -> tuple[Callable[..., Any], str]:
    """What of a denoiser is compiled, and the attribute that holds the result: a DiT of ours leaves out the choice of an expert."""
    if hasattr(denoiser, "_compiled_denoise"):
        return denoiser._denoise, "_compiled_denoise"
    return denoiser._call_impl, COMPILED_CALL


def _copied(output: Any) -> Any:
    """Copy the tensors in what a denoiser returned."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, BaseOutput):
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(map(_copied, output))
    return output
