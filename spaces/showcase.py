"""The pipelines that the Space shows: where they are loaded from, and how images are generated with one."""

import copy
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler
from diffusers_dmp.diffusion.schedulers import SCHEDULERS, make_like
from diffusers_dmp.pipelines.denoising import DenoisingMixin
from diffusers_dmp.systems import SYSTEMS

MODELS = Path(__file__).parent / "models"
SHIPPED = ("dtr", "remix", "dmp", "patch", "ppap")  # systems by their short names
TITLES = {name: system.title for name in SHIPPED for system in SYSTEMS.values() if system.short_name == name}
ALL_CLASSES = "all"
CLASSIFIER_FREE_SCALE = 1.5
EXPERTS_SCALE = 7.5  # the PPAP paper's
OnStep = Callable[[int, int], None]  # called with (steps done, steps in all)


@dataclass
class ShownPipeline:
    """
    A pipeline with a name.

    Args:
        name (`str`): Its name in the API.
        pipeline: A pipeline of this package.
        experts ([`GuidanceExperts`], *optional*): Guidance experts, by which an unconditional pipeline generates classes.
        is_shipped (`bool`): Whether the pipeline comes with the Space.
    """

    name: str
    pipeline: DenoisingMixin
    experts: GuidanceExperts | None = None
    is_shipped: bool = False

    @classmethod
    def load(cls, name: str, source: "str | Path", device: str | None = None) -> "ShownPipeline":
        """
        Load a pipeline from a folder or Hub id, with the guidance experts and their network from its sub-folders, if any.

        Args:
            name (`str`): Its name in the API.
            source (`str` or `Path`): The folder or Hub id.
            device (`str`, *optional*): Where it computes; by default on a GPU if there is one.

        Raises:
            ValueError: if it is a pipeline of another package.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        is_shipped = Path(source) == MODELS / name
        source = Path(source if Path(source).is_dir() else snapshot_download(str(source)))
        pipeline = DiffusionPipeline.from_pretrained(source)
        if not isinstance(pipeline, DenoisingMixin):
            raise ValueError(f"Expected a pipeline of diffusers-dmp, but got a {type(pipeline).__name__}.")
        pipeline.set_progress_bar_config(disable=True)
        experts = None
        if (source / "experts").is_dir():
            experts = GuidanceExperts.from_pretrained(source / "experts", base_model=source / "base_model")
        return cls(name, pipeline.to(device), experts and experts.to(device), is_shipped)

    @property
    def title(self) -> str:
        """The name on the page."""
        return TITLES.get(self.name, self.name)

    @property
    def classes(self) -> list[str]:
        """The names of the classes that can be asked for, by index; empty without classes."""
        id2label, count = self.pipeline.config.get("id2label") or {}, self.pipeline.num_classes or 0
        if self.experts is not None:
            id2label, count = self.experts.network_config.id2label, self.experts.network_config.num_labels
        names = {int(index): name for index, name in id2label.items()}
        names = [names.get(index, str(index)) for index in range(count)]
        # ImageNet has two classes named 'crane', and a class may be named 'all'
        ambiguous = {name for name, number in Counter([*names, ALL_CLASSES]).items() if number > 1}
        return [f"{name} ({index})" if name in ambiguous else name for index, name in enumerate(names)]

    @property
    def default_scale(self) -> float:
        """The scale of guidance by experts or without a classifier; 1 without guidance."""
        if self.experts is not None:
            return EXPERTS_SCALE
        return CLASSIFIER_FREE_SCALE if self.pipeline.has_null_class else 1.0

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.pipeline.scheduler.config.num_train_timesteps

    def labels(self, class_name: str, count: int) -> list[int] | None:
        """Return the class of each of `count` images, all classes in turn for 'all'; None without classes."""
        if not self.classes:
            return None
        if class_name == ALL_CLASSES:
            return [index % len(self.classes) for index in range(count)]
        return [self.classes.index(class_name)] * count

    def guided(self, pipeline: DenoisingMixin, labels: list[int], scale: float = EXPERTS_SCALE) -> DenoisingMixin:
        """Return a copy of a pipeline, with the same models, that the experts guide to the classes `labels`."""
        pipeline = copy.copy(pipeline)
        pipeline.scheduler = GuidedScheduler(pipeline.scheduler, self.experts, ClassTarget(labels), scale)
        return pipeline

    def generate(
        self,
        class_name: str,
        count: int,
        *,
        scale: float,
        num_inference_steps: int,
        scheduler: str,
        seed: int,
        on_step: OnStep | None = None,
        guided_by_experts: bool = True,
    ) -> list[Image.Image]:
        """
        Generate images.

        Args:
            class_name (`str`): One of `classes`, or 'all'.
            count (`int`): The number of images.
            scale (`float`): The scale of guidance by the experts if there are any, else of classifier-free guidance.
            num_inference_steps (`int`): The number of denoising steps.
            scheduler (`str`): One of [`SCHEDULERS`].
            seed (`int`): The seed of the noise. All pipelines make similar images from the same noise.
            on_step (`Callable`, *optional*): Called after each step.
            guided_by_experts (`bool`): Whether the experts guide; False for a comparison.

        Raises:
            ValueError: as the pipeline does for a request that it cannot fulfil.
        """
        labels = self.labels(class_name, count)
        # a copy with the same models, because a scheduler has a state that belongs to one call
        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = make_like(pipeline.scheduler, SCHEDULERS[scheduler])
        request = {"batch_size": count}
        if self.experts is None:
            request |= {"class_labels": labels, "guidance_scale": scale}
        elif guided_by_experts:
            pipeline = self.guided(pipeline, labels, scale)

        def step_done(pipeline, step: int, timestep, tensors: dict) -> dict:
            on_step(step + 1, pipeline.num_timesteps)
            return {}

        return pipeline(
            **request,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            callback_on_step_end=step_done if on_step else None,
        ).images


def sources(setting: str) -> dict[str, "str | Path"]:
    """
    Find out which pipelines to show: the shipped ones and those of a setting, which replace shipped ones of the same name.

    Args:
        setting (`str`): 'name=folder-or-hub-id' or plain ids, separated by commas; a plain id's name is its last part.

    Returns:
        The folders or Hub ids by name.

    Raises:
        ValueError: if two pipelines have one name.
    """
    found = {name: MODELS / name for name in TITLES if (MODELS / name).is_dir()}
    named = {}
    for entry in filter(None, map(str.strip, setting.split(","))):
        name, equals, source = entry.partition("=")
        if not equals or "/" in name:  # a folder may have a '=' in its name
            name, source = Path(entry).name, entry
        name = name.strip()
        if name in named or (not equals and name in found):
            raise ValueError(
                f"Expected each of `DMP_PIPELINES` to have a name of its own, but got {name!r} twice; 'name=id' sets a name."
            )
        named[name] = source.strip()
    return found | named


def load_pipelines(setting: str | None = None) -> tuple[dict[str, ShownPipeline], list[str]]:
    """
    Load all pipelines, and leave out those that do not load.

    Args:
        setting (`str`, *optional*): See [`sources`]; the environment's `DMP_PIPELINES` by default.

    Returns:
        The pipelines by name, and a sentence for each one that does not load.

    Raises:
        ValueError: if no pipeline loads.
    """
    setting = os.environ.get("DMP_PIPELINES", "") if setting is None else setting
    pipelines, problems = {}, []
    for name, source in sources(setting).items():
        try:
            pipelines[name] = ShownPipeline.load(name, source)
        except Exception as error:  # any error: the others are still shown
            reason = str(error).strip().split("\n")[0][:300]
            problems.append(f"{name} was left out, as {str(source)!r} does not load: {reason or type(error).__name__}")
    if not pipelines:
        raise ValueError(f"Expected at least one pipeline that loads, but got none. {' '.join(problems)}")
    return pipelines, problems
