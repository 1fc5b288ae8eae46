"""The pipeline that a text-to-image training begins with: only what the training needs of it is loaded."""

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
    """

    name: str
    pipeline: Any
    family: TextPipeline
    dtype: torch.dtype

    @property
    def denoiser(self) -> Any:
        """The denoiser that is trained."""
        return getattr(self.pipeline, self.family.component)

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
        own = {self.family.component: self.denoiser, "scheduler": self.fresh_scheduler}
        return DiffusionPipeline.from_pretrained(self.name, dtype=self.dtype, **own, **components)


def load_source(name: str, dtype: torch.dtype, with_vae: bool = False) -> SourcePipeline:
    """
    Load the denoiser and the scheduler of a pipeline.

    Args:
        name (`str`): A folder or Hub id.
        dtype (`torch.dtype`): Of the weights.
        with_vae (`bool`): Whether to load the VAE as well.

    Raises:
        OSError: if there is no such pipeline.
        ValueError: if its family is not known, or it has another denoiser than that.
    """
    index: Any = DiffusionPipeline.load_config(name)
    class_name = index.get("_class_name")
    known_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if known_class is not None:
        text_pipeline_of(known_class)  # before weights are loaded
    wanted = {"transformer", "unet", "scheduler", *(["vae"] if with_vae else [])}
    components = [key for key, value in index.items() if is_component(value) and value != [None, None]]
    left_out = {component: None for component in components if component not in wanted and component[0] != "_"}
    pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **left_out)
    family = text_pipeline_of(pipeline)
    if getattr(pipeline, family.component, None) is None:
        raise ValueError(f"Expected {name!r} to be a pipeline with a `{family.component}`, but got one without.")
    return SourcePipeline(name, pipeline, family, dtype)
