"""How denoisers are compiled: the backend and mode that were asked for, checked, and what has become of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging

compilation_logger = logging.get_logger(__name__)

WITHOUT_GRAPHS = '`compile(mode="default")` compiles without graphs.'


class Compilation:
    """
    How the denoisers of a pipeline are compiled, and what has become of it: they share one of these objects.

    Args:
        backend (`str` or `Callable`): A backend of [`torch.compile`].
        mode (`str`, *optional*): A mode of 'inductor'. If None, CUDA graphs ('reduce-overhead') on a CUDA device without gradients,
            unless something is in their way, and 'default' elsewhere.
        obstacle (`str`, *optional*): What is in the way of CUDA graphs; see [`obstacle_to_graphs`].
        options: The other arguments of [`torch.compile`].

    Raises:
        ValueError: if there is no such backend, or it has no such mode.
    """

    def __init__(
        self,
        backend: "str | Callable[..., Any]" = "inductor",
        mode: str | None = None,
        *,
        obstacle: str | None = None,
        **options: Any,
    ):
        _check_backend(backend)
        _check_mode(backend, mode)
        self.backend, self.mode, self.options = backend, mode, options
        self.obstacle = obstacle
        self.compiled(_nothing, mode)  # PyTorch checks the options
        self.is_eager = False
        self.shapes: set[tuple[int, ...]] = set()  # of samples, for which graphs were captured

    def compiled(self, function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
        """
        Call `torch.compile`, which compiles nothing yet.

        Args:
            function (`Callable`): What is to be compiled.
            mode (`str`, *optional*): The mode.
        """
        mode = None if mode == "default" else mode  # the same for PyTorch, also for backends without modes
        return torch.compile(function, backend=self.backend, mode=mode, **self.options)

    def mode_on(self, device: torch.device) -> str | None:
        """
        Return the mode of `torch.compile` for a call.

        Args:
            device (`torch.device`): Where the denoiser computes.
        """
        if self.mode is not None or self.backend != "inductor" or self.options.get("options"):
            return self.mode  # PyTorch takes either a mode or options
        # in training, batches of an expert have any size, and each would be captured
        has_graphs = self.obstacle is None and device.type == "cuda" and not torch.is_grad_enabled()
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

    def check(self, device: torch.device) -> None:
        """
        Check that CUDA graphs which were asked for by name are possible.

        Args:
            device (`torch.device`): Where the denoisers compute.

        Raises:
            ValueError: if they are not.
        """
        if not self._has_graphs(self.mode):
            return
        asked = f"mode {self.mode!r}" if self.mode is not None else f"backend {self.backend!r}"
        if self.options.get("options"):
            asked = f"options {self.options['options']}"
        if self.obstacle is not None:
            raise ValueError(f"Expected another than the {asked}, as {self.obstacle}; {WITHOUT_GRAPHS}")
        if device.type != "cuda":
            modes = [name for name, each in _options_of_modes().items() if not each.get("triton.cudagraphs")]
            raise ValueError(
                f"Expected a CUDA device for the {asked}, which captures CUDA graphs, but got {device.type!r}: "
                f'`pipe.to("cuda")` before, or one of the modes {", ".join(modes)}.'
            )

    def fall_back(self, name: str, reason: "str | Exception") -> None:
        """
        Call all denoisers eagerly from now on, and say so once.

        Args:
            name (`str`): The class of the denoiser that cannot be compiled.
            reason (`str` or `Exception`): Why.
        """
        if not self.is_eager:
            reason = reason if isinstance(reason, str) else in_one_line(reason)
            compilation_logger.warning("The %s runs eagerly, as it cannot be compiled: %s", name, reason)
        self.is_eager = True

    def note_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """
        Say once for each shape but the first that it is captured by itself.

        Args:
            name (`str`): The class of the denoiser.
            shape (`tuple[int, ...]`): The shape of the sample.
        """
        if self.shapes and shape not in self.shapes:
            compilation_logger.warning(
                "The %s captures CUDA graphs for samples of shape %s as well, number %d of the shapes so far: the first steps "
                "are slow, and each graph takes memory.",
                name,
                shape,
                len(self.shapes) + 1,
            )
        self.shapes.add(shape)


def _nothing() -> None:
    pass


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


def in_one_line(error: Exception) -> str:
    """
    Say what went wrong in compiling, without the advice and the traces that follow it.

    Args:
        error (`Exception`): PyTorch's.
    """
    error = getattr(error, "inner_exception", error)  # what a backend raised
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
