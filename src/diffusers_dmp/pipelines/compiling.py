"""One call that makes a pipeline fast: its denoisers compiled, in CUDA graphs where there is a CUDA device."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..models.compiled_calls import check_layers_stay, check_no_graphs, compile_denoisers


class CompilationMixin:
    """Compiles the denoisers of a [`DiffusionPipeline`], in front of which it stands among the parent classes."""

    _execution_device: torch.device  # which `DiffusionPipeline` provides

    @property
    def denoisers(self) -> list[ModelMixin]:
        """All denoisers of the pipeline, which have the same channels, size and classes."""
        raise NotImplementedError

    def compile(
        self,
        backend: "str | Callable[..., Any]" = "inductor",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
    ) -> None:
        """
        Compile the denoisers, so that steps cost less. The first steps take longer: that is when it happens.

        Nothing is compiled again when the expert changes. Where compiling fails, as without a compiler, the pipeline says so in one
        line and samples eagerly. The other parts of a pipeline stay as they are; so does a copy of a denoiser.

        Args:
            backend (`str` or `Callable`): See [`torch.compile`].
            mode (`str`, *optional*): A mode of the backend 'inductor'. If None, 'reduce-overhead' on a CUDA device, which replays
                CUDA graphs, and 'default' elsewhere or if the denoisers are offloaded.
            dynamic (`bool`, *optional*): See [`torch.compile`]. By default sizes that change are compiled once for all sizes; CUDA
                graphs are captured once for each.
            fullgraph (`bool`): Raise PyTorch's error instead of sampling eagerly, also where a denoiser is not one graph.

        Raises:
            ValueError: if there is no such backend or mode, or it captures CUDA graphs and there is no CUDA device or the denoisers
                are offloaded.
        """
        is_offloaded = bool(getattr(self, "_all_hooks", None))  # by `enable_model_cpu_offload`
        arguments: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic, "fullgraph": fullgraph}
        compile_denoisers(self.denoisers, self._execution_device, is_offloaded, **arguments)

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """
        See [`DiffusionPipeline.enable_model_cpu_offload`].

        Raises:
            ValueError: if a denoiser was compiled with CUDA graphs.
        """
        check_no_graphs(self.denoisers, self._execution_device)
        super().enable_model_cpu_offload(*args, **kwargs)  # type: ignore[misc]  # of `DiffusionPipeline`

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """
        See [`DiffusionPipeline.enable_sequential_cpu_offload`]. Denoisers that were compiled run eagerly then.

        Raises:
            ValueError: if a denoiser was compiled with CUDA graphs.
        """
        check_no_graphs(self.denoisers, self._execution_device)
        super().enable_sequential_cpu_offload(*args, **kwargs)  # type: ignore[misc]
        check_layers_stay(self.denoisers)

    def enable_group_offload(self, *args, **kwargs) -> None:
        """
        See [`DiffusionPipeline.enable_group_offload`].

        Raises:
            ValueError: if a denoiser was compiled with CUDA graphs.
        """
        check_no_graphs(self.denoisers, self._execution_device)
        super().enable_group_offload(*args, **kwargs)  # type: ignore[misc]
