"""The pipeline that a text-to-image training begins with: only what the training needs of it is loaded."""

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...intervals import NoiseIntervals
from ...models.denoiser_experts import DenoiserExperts
from ...saving.pipeline_parts import load_components, saved_class
from ..text_pipelines import TextPipeline, text_pipeline_of
from ..text_pipelines.index import read_pipeline_index


class SourcePipeline:
    """
    The pipeline that a training begins with. At first its scheduler alone is loaded.

    Args:
        name (`str`): Its folder or Hub id.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if it is something else, its family is not known, or its scheduler is none of Diffusers'.
    """

    pipeline: Any  # with the components that `load` has loaded
    family: TextPipeline
    dtype: torch.dtype  # of the components
    called: nn.Module  # the denoiser, or the two of Wan2.2 as one module: what the training calls

    def __init__(self, name: str):
        self.name = name
        self.index: Any = read_pipeline_index("pretrained_model_name_or_path", name)
        known_class = saved_class(self.index)
        if known_class is not None:  # or else it is seen when it is loaded
            self.family = text_pipeline_of(known_class)
        # the class itself: `DiffusionPipeline` loads optional components (Wan's transformers) although they are given
        self.pipeline_class: Any = known_class or DiffusionPipeline
        scheduler_class: Any = getattr(diffusers, str(self.index["scheduler"][1]), None)
        if scheduler_class is None:
            raise ValueError(
                f"Expected {name!r} to have a scheduler of Diffusers, but got {self.index['scheduler'][1]!r}."
            )
        self.scheduler: Any = scheduler_class.from_pretrained(name, subfolder="scheduler")

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.scheduler.config["num_train_timesteps"]

    @property
    def boundary(self) -> float | None:
        """The timestep at which the pipeline changes from one denoiser to another; None for a pipeline with one."""
        ratio = self.index.get("boundary_ratio")
        has_two = self.index.get("transformer_2", [None, None]) != [None, None]
        return None if ratio is None or not has_two else round(ratio * self.num_train_timesteps, 9)

    def load(self, dtype: torch.dtype, with_vae: bool = False, needed: tuple[float, float] | None = None) -> None:
        """
        Load the denoiser, or both.

        Args:
            dtype (`torch.dtype`): Of the weights.
            with_vae (`bool`): Whether to load the VAE as well.
            needed (`tuple[float, float]`, *optional*): Of two denoisers, load the one that owns these timesteps alone.

        Raises:
            ValueError: if the pipeline's family is not known, or it has no denoiser.
        """
        wanted = {"transformer", "transformer_2", "unet", *(["vae"] if with_vae else [])}
        if self.boundary is not None and needed is not None:
            wanted -= {"transformer_2" if needed[0] >= self.boundary else "transformer"}
        pipeline = load_components(self.name, wanted.__contains__, dtype=dtype, scheduler=self.fresh_scheduler())
        self.pipeline, self.dtype = pipeline, dtype
        self.family = text_pipeline_of(pipeline)
        if not self.denoisers:
            raise ValueError(
                f"Expected {self.name!r} to be a pipeline with a `{self.family.component}`, but got one without."
            )
        self.called = self.denoiser if len(self.denoisers) == 1 else DenoiserExperts.from_pipeline(pipeline)

    @property
    def denoisers(self) -> dict[str, Any]:
        """The denoisers that are loaded, by the names of their components."""
        found = {name: getattr(self.pipeline, name, None) for name in self.family.components}
        return {name: denoiser for name, denoiser in found.items() if denoiser is not None}

    @property
    def denoiser(self) -> Any:
        """The denoiser; of two, that for the most noise."""
        return next(iter(self.denoisers.values()))

    def fresh_scheduler(self) -> Any:
        """A copy of the scheduler that has sampled nothing yet."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def sampling_pipeline(self) -> Any:
        """The pipeline without its text encoders, with a scheduler that has sampled nothing yet."""
        self.pipeline.register_modules(scheduler=self.fresh_scheduler())
        return self.pipeline

    def encoding_pipeline(self) -> Any:
        """A pipeline that encodes prompts: with its text encoders, and without the VAE."""
        return self._with_others(**self.denoisers, vae=None)

    def whole_pipeline(self, denoiser: nn.Module) -> Any:
        """A pipeline with all components, as it is saved: with a denoiser that is trained, and the others as they are."""
        return self.pipeline_with(**{self.family.component: denoiser})

    def pipeline_with(self, **denoisers: nn.Module) -> Any:
        """A pipeline with all components: with these, by their names, and the others as they are."""
        return self._with_others(**denoisers)

    def _with_others(self, **components: Any) -> Any:
        components["scheduler"] = self.fresh_scheduler()
        return self.pipeline_class.from_pretrained(self.name, dtype=self.dtype, **components)

    def expect_one_denoiser(self, method: str) -> None:
        """
        Check that the pipeline has one denoiser.

        Raises:
            ValueError: if it changes from one to another.
        """
        if self.boundary is not None:
            raise ValueError(
                f"Expected `method` to be lora_experts for {self.name!r}, which changes its denoiser at the timestep "
                f"{self.boundary:g}, but got {method!r}."
            )

    def check_boundaries(self, intervals: NoiseIntervals) -> None:
        """
        Check that each interval is denoised by one denoiser.

        Raises:
            ValueError: if the pipeline changes its denoiser inside one.
        """
        if self.boundary is not None and self.boundary not in intervals.edges:
            raise ValueError(
                f"Expected the intervals to have a boundary where {self.name!r} changes its denoiser, at the timestep "
                f"{self.boundary:g} (σ {self.boundary / self.num_train_timesteps:g}), but got the edges "
                f"{', '.join(f'{edge:g}' for edge in intervals.edges)}."
            )
