"""The pipeline that a text-to-image training begins with: only what the training needs of it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ...saving.mixins import is_component
from ..text_pipelines import TextPipeline, text_pipeline_of


@dataclass
class SourcePipeline:
    """
    The pipeline that a training begins with.

    Args:
        name (`str`): Its folder or Hub id.
        pipeline ([`DiffusionPipeline`]): With the denoiser that is trained and the scheduler; where samples are generated, with
            the VAE as well.
        family ([`TextPipeline`]): How it encodes prompts and calls its denoiser.
        dtype (`torch.dtype`): Of what is not trained.
        component (`str`): The name of the denoiser that is trained.
    """

    name: str
    pipeline: Any
    family: TextPipeline
    dtype: torch.dtype
    component: str

    @property
    def denoiser(self) -> Any:
        """The denoiser that is trained."""
        return getattr(self.pipeline, self.component)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.pipeline.scheduler.config["num_train_timesteps"]

    @property
    def fresh_scheduler(self) -> Any:
        """A copy of the scheduler that has sampled nothing yet."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)

    def sampling_pipeline(self) -> Any:
        """The pipeline without its text encoders, with a scheduler that has sampled nothing yet."""
        self.pipeline.register_modules(scheduler=self.fresh_scheduler)
        return self.pipeline

    def whole_pipeline(self) -> Any:
        """A pipeline with all components, as it is saved: the denoiser is the trained one, the others are loaded."""
        return self._with_other_components()

    def encoding_pipeline(self) -> Any:
        """A pipeline that encodes prompts: with its text encoders, and without the VAE."""
        return self._with_other_components(vae=None)

    def _with_other_components(self, **components: Any) -> Any:
        own = {self.component: self.denoiser, "scheduler": self.fresh_scheduler}
        return type(self.pipeline).from_pretrained(self.name, dtype=self.dtype, **own, **components)


def load_source(
    name: str,
    dtype: torch.dtype,
    with_vae: bool = False,
    trained_timesteps: Callable[[Any], tuple[float, float]] | None = None,
) -> SourcePipeline:
    """
    Load the denoiser and the scheduler of a pipeline.

    Args:
        name (`str`): A folder or Hub id.
        dtype (`torch.dtype`): Of the weights.
        with_vae (`bool`): Whether to load the VAE as well, to generate samples.
        trained_timesteps (`Callable`, *optional*): From the scheduler to the timesteps [low, high) that are trained; by default
            all of them. They choose the denoiser of a pipeline that has two.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if its family is not known, it has another denoiser than that, or two and both would have to be trained.
    """
    index: Any = DiffusionPipeline.load_config(name)
    class_name = index.get("_class_name")
    known_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    components = [key for key, value in index.items() if is_component(value) and value != [None, None]]
    denoiser = None
    if known_class is not None:
        family = text_pipeline_of(known_class)  # before weights are loaded
        denoisers = [each for each in family.components if each in components]
        if len(denoisers) > 1 and index.get("boundary_ratio") is not None:
            denoiser = _denoiser_of(name, index, (denoisers[0], denoisers[1]), trained_timesteps, with_vae)
    wanted = {*([denoiser] if denoiser else ["transformer", "unet"]), "scheduler", *(["vae"] if with_vae else [])}
    left_out = {component: None for component in components if component not in wanted and component[0] != "_"}
    # by its own class: of `DiffusionPipeline`, those that are optional (Wan's transformers) are loaded all the same
    pipeline_class: Any = known_class or DiffusionPipeline
    pipeline = pipeline_class.from_pretrained(name, dtype=dtype, **left_out)
    family = text_pipeline_of(pipeline)
    denoiser = denoiser or family.component
    if getattr(pipeline, denoiser, None) is None:
        raise ValueError(f"Expected {name!r} to be a pipeline with a `{denoiser}`, but got one without.")
    return SourcePipeline(name, pipeline, family, dtype, denoiser)


def _denoiser_of(
    name: str,
    index: Any,
    denoisers: tuple[str, str],
    trained_timesteps: Callable[[Any], tuple[float, float]] | None,
    with_samples: bool,
) -> str:
    """
    Choose the one of two denoisers (Wan2.2) that owns the timesteps that are trained.

    Raises:
        ValueError: if both own some of them, or samples are wanted, which need both.
    """
    _, scheduler_class = index["scheduler"]
    scheduler = getattr(diffusers, scheduler_class).from_pretrained(name, subfolder="scheduler")
    total = scheduler.config["num_train_timesteps"]
    boundary = round(index["boundary_ratio"] * total, 9)  # as in `NoiseIntervals.from_sigmas`
    low, high = (0, total) if trained_timesteps is None else trained_timesteps(scheduler)
    if low < boundary < high:
        raise ValueError(
            f"Expected the timesteps that are trained to be of one denoiser of {name!r}, {denoisers[0]} from {boundary:g} on or "
            f"{denoisers[1]} below, but got {low:g} to {high:g}; with the method lora_experts, `sigma_boundaries` "
            f"{index['boundary_ratio']:g} and then `expert` 0 and 1, each of them is trained by itself."
        )
    if with_samples:
        raise ValueError(
            f"Expected `sample_steps` to be 0 for {name!r}, whose samples need two denoisers, of which the training loads one."
        )
    return denoisers[0] if low >= boundary else denoisers[1]
