"""Denoisers that are compiled in place, and are called eagerly where that fails: CUDA graphs, shapes, offloading.

https://docs.pytorch.org/docs/stable/torch.compiler_cudagraph_trees.html
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.utils import BaseOutput, logging
from torch import nn

logger = logging.get_logger(__name__)

# How many graphs PyTorch may make of one function; with more it says so, and runs it eagerly. Its own limit of 8 is for all models of
# a class together: each size of model, resolution (the first few), batch of one, and adapter takes one.
MAX_GRAPHS = 256


class Compilation:
    """
    How the denoisers of a pipeline are compiled, and what has become of it: they share one of these objects.

    Args:
        backend (`str` or `Callable`): A backend of [`torch.compile`].
        mode (`str`, *optional*): A mode of 'inductor'. If None, CUDA graphs ('reduce-overhead') on a CUDA device, unless
            `allows_graphs` is False, and 'default' elsewhere.
        allows_graphs (`bool`): Whether weights stay where they are, as CUDA graphs need it.
        options: The other arguments of [`torch.compile`].

    Raises:
        ValueError: if there is no such backend, or it has no such mode.
    """

    def __init__(
        self,
        backend: "str | Callable[..., Any]" = "inductor",
        mode: str | None = None,
        *,
        allows_graphs: bool = True,
        **options: Any,
    ):
        _check_backend(backend)
        _check_mode(backend, mode)
        self.backend, self.mode, self.options = backend, mode, options
        self.allows_graphs = allows_graphs
        self.has_failed = False
        self.shapes: set[tuple[int, ...]] = set()  # of samples, for which graphs were captured

    def mode_on(self, device: torch.device) -> str | None:
        """
        Return the mode of `torch.compile` for a call.

        Args:
            device (`torch.device`): Where the denoiser computes.
        """
        if self.mode is not None or self.backend != "inductor" or self.options.get("options"):
            return self.mode  # PyTorch takes either a mode or options
        # in training, batches of an expert have any size, and each would be captured
        has_graphs = self.allows_graphs and device.type == "cuda" and not torch.is_grad_enabled()
        return "reduce-overhead" if has_graphs else "default"

    def captures_graphs(self, device: torch.device) -> bool:
        """
        Tell whether a call is captured in a CUDA graph.

        Args:
            device (`torch.device`): Where the denoiser computes.
        """
        return device.type == "cuda" and self._has_graphs(self.mode_on(device))

    def _has_graphs(self, mode: str | None) -> bool:
        asked = self.options.get("options") or _options_of_modes().get(mode, {})
        return self.backend == "cudagraphs" or bool(asked.get("triton.cudagraphs"))

    def check(self, device: torch.device, is_offloaded: bool) -> None:
        """
        Check that CUDA graphs which were asked for by name are possible.

        Args:
            device (`torch.device`): Where the denoisers compute.
            is_offloaded (`bool`): Whether their weights move.

        Raises:
            ValueError: if they are not.
        """
        if not self._has_graphs(self.mode):
            return
        asked = f"backend {self.backend!r}" if self.mode is None else f"mode {self.mode!r}"
        if is_offloaded:
            raise ValueError(f"Expected the {asked} without offloading, but got both: {_REASON}")
        if device.type != "cuda":
            modes = [name for name, each in _options_of_modes().items() if not each.get("triton.cudagraphs")]
            raise ValueError(
                f"Expected a CUDA device for the {asked}, which captures CUDA graphs, but got {device.type!r}: "
                f'`pipe.to("cuda")` before, or one of the modes {", ".join(modes)}.'
            )

    def fail(self, name: str, error: Exception) -> None:
        """
        Call all denoisers eagerly from now on, and say so once.

        Args:
            name (`str`): The class of the denoiser that could not be compiled.
            error (`Exception`): Why.
        """
        if not self.has_failed:
            logger.warning("The %s runs eagerly, as it could not be compiled: %s", name, _in_one_line(error))
        self.has_failed = True

    def note_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Say once for each shape but the first that it is captured by itself.

        Args:
            name (`str`): The class of the denoiser.
            shape (`tuple[int, ...]`): The shape of the sample.
        """
        if self.shapes and shape not in self.shapes:
            logger.warning(
                "The %s captures CUDA graphs for samples of shape %s as well, number %d of the shapes so far: the first steps are slow, "
                "and each graph takes memory.",
                name,
                shape,
                len(self.shapes) + 1,
            )
        self.shapes.add(shape)


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
        if self.compilation.has_failed:
            return self._call_eagerly(*args, **kwargs)
        sample = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), torch.empty(0))
        captures = self.compilation.captures_graphs(sample.device)
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
        self.compilation.fail(type(self._denoiser).__name__, reason)
        return output

    def _begin_step(self, shape: tuple[int, ...]) -> None:
        if not self._is_checked:  # with the first call, as other pipelines offload without asking
            check_no_offloading(self._denoiser)
            self._is_checked = True
        self.compilation.note_shape(type(self._denoiser).__name__, shape)
        if not torch.is_grad_enabled():  # PyTorch would forget what backward passes are still to come
            torch.compiler.cudagraph_mark_step_begin()

    def _call_compiled(self, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> Any:
        mode = self.compilation.mode_on(device)
        if mode not in self._compiled:
            # "default" is PyTorch's name of None, which backends without modes take as well
            self._compiled[mode] = torch.compile(
                self._function,
                backend=self.compilation.backend,
                mode=None if mode == "default" else mode,
                **self.compilation.options,
            )
        config = torch._dynamo.config
        limit = config.recompile_limit
        config.recompile_limit = max(limit, MAX_GRAPHS)  # what compiling reads, and no other functions
        try:
            return self._compiled[mode](*args, **kwargs)
        finally:
            config.recompile_limit = limit

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
    is_offloaded = is_offloaded or any(map(has_offloading_hooks, denoisers))
    compilation = Compilation(**arguments, allows_graphs=not is_offloaded)
    compilation.check(device, is_offloaded)
    for denoiser in denoisers:
        function, attribute = _compiled_part(denoiser)
        setattr(denoiser, attribute, CompiledCalls(function, denoiser, compilation))


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
        with torch.no_grad():  # as they are sampled with
            if compilation is not None and compilation.captures_graphs(device):
                raise _offloaded(denoiser)


def check_no_offloading(denoiser: nn.Module) -> None:
    """
    Check that no hooks of Accelerate or Diffusers move the weights of a model, or of its layers, when it is called.

    Args:
        denoiser (`nn.Module`): The model.

    Raises:
        ValueError: if there are some.
    """
    if has_offloading_hooks(denoiser):
        raise _offloaded(denoiser)


def has_offloading_hooks(denoiser: nn.Module) -> bool:
    """
    Tell whether hooks of Accelerate or Diffusers move the weights of a model, or of its layers, when it is called.

    Args:
        denoiser (`nn.Module`): The model.
    """
    return any(map(_is_offloaded, denoiser.modules()))


def _offloaded(denoiser: nn.Module) -> ValueError:
    return ValueError(f"Expected CUDA graphs or offloading for a {type(denoiser).__name__}, but got both: {_REASON}")


_REASON = 'a graph reads weights at fixed addresses, and offloading moves them. `compile(mode="default")` does without graphs.'


def _denoisers_in(denoisers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Denoisers, with the experts of those that consist of several."""
    for denoiser in denoisers:
        experts = getattr(denoiser, "experts", None)
        yield from experts if isinstance(experts, nn.ModuleList) else (denoiser,)


def _compiled_part(denoiser: Any) -> tuple[Callable[..., Any], str]:
    """What of a denoiser is compiled, and the attribute that holds the result: a DiT of ours leaves out the choice of an expert."""
    if hasattr(denoiser, "_compiled_denoise"):
        return denoiser._denoise, "_compiled_denoise"
    # where `nn.Module.compile` puts it, private to PyTorch, which has no public way to do anything around a call in place
    return denoiser._call_impl, "_compiled_call_impl"


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)  # Accelerate's
    moves = any(
        isinstance(each, CpuOffload) or (isinstance(each, AlignDevicesHook) and each.offload)
        for each in getattr(hook, "hooks", (hook,))
    )
    registry = getattr(
        module, "_diffusers_hook", None
    )  # Diffusers', which says it of whole models in private functions only
    return moves or any("group_offloading" in name for name in getattr(registry, "hooks", ()))


def _check_backend(backend: Any) -> None:
    if not callable(backend) and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"Expected `backend` to be one of {', '.join(torch.compiler.list_backends())}, or a function, but got {backend!r}."
        )


def _check_mode(backend: Any, mode: str | None) -> None:
    if mode is None:
        return
    if backend != "inductor":
        raise ValueError(f"Expected no `mode` for a backend other than 'inductor', but got {mode!r} for {backend!r}.")
    if mode not in _options_of_modes():
        raise ValueError(f"Expected `mode` to be one of {', '.join(_options_of_modes())}, or None, but got {mode!r}.")


@functools.cache
def _options_of_modes() -> dict[Any, dict[str, Any]]:
    """The modes of 'inductor', and what each sets."""
    import torch._inductor  # takes a second, and is needed only here

    return torch._inductor.list_mode_options()


def _copied(output: Any) -> Any:
    """Copy the tensors in what a denoiser returned."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, BaseOutput):
        return type(output)(**{name: _copied(value) for name, value in output.items()})
    if isinstance(output, (list, tuple)):
        return type(output)(map(_copied, output))
    return output


def _in_one_line(error: Exception) -> str:
    """What went wrong, without the advice and the traces that follow it."""
    error = getattr(error, "inner_exception", error)  # what a backend raised
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
