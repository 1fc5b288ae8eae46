"""The systems that the Space shows: where they come from, and how one is asked to draw."""

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

MODELS = Path(__file__).parent / "models"
TITLES = {"dtr": "DTR", "remix": "Remix-DiT", "dmp": "DMP", "patch": "Patch Diffusion", "ppap": "PPAP"}
ALL_CLASSES = "all"
CLASSIFIER_FREE_SCALE = 1.5
EXPERTS_SCALE = 7.5  # the PPAP paper's
OnStep = Callable[[int, int], None]  # told (steps done, steps in all)


@dataclass
class System:
    """
    A pipeline under a name.

    Args:
        name (`str`): As the API has it.
        pipeline: One of this package's.
        experts ([`GuidanceExperts`], *optional*): Which let an unconditional pipeline draw classes.
        is_shipped (`bool`): Whether it is one of the Space's own.
    """

    name: str
    pipeline: DenoisingMixin
    experts: GuidanceExperts | None = None
    is_shipped: bool = False

    @classmethod
    def load(cls, name: str, source: "str | Path") -> "System":
        """
        From a folder or Hub id; the experts and the network that they were made of from folders inside it, if it has them.

        Raises:
            ValueError: if it is a pipeline of another package.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
        """The name that is shown."""
        return TITLES.get(self.name, self.name)

    @property
    def classes(self) -> list[str]:
        """The names of what it can be asked to draw, by index; none if it cannot be asked."""
        id2label, count = self.pipeline.config.get("id2label") or {}, self.pipeline.num_classes or 0
        if self.experts is not None:
            id2label, count = self.experts.network_config.id2label, self.experts.network_config.num_labels
        names = {int(index): name for index, name in id2label.items()}
        names = [names.get(index, str(index)) for index in range(count)]
        # ImageNet has two cranes; and a class may be called what stands for all of them
        ambiguous = {name for name, number in Counter([*names, ALL_CLASSES]).items() if number > 1}
        return [f"{name} ({index})" if name in ambiguous else name for index, name in enumerate(names)]

    @property
    def default_scale(self) -> float:
        """Of guidance, classifier-free or by experts; 1 where nothing guides."""
        if self.experts is not None:
            return EXPERTS_SCALE
        return CLASSIFIER_FREE_SCALE if self.pipeline.has_null_class else 1.0

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.pipeline.scheduler.config.num_train_timesteps

    def labels(self, class_name: str, count: int) -> list[int] | None:
        """The class of each of `count` images; in turn for 'all', none for a system without classes."""
        if not self.classes:
            return None
        if class_name == ALL_CLASSES:
            return [index % len(self.classes) for index in range(count)]
        return [self.classes.index(class_name)] * count

    def draw(
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
        Args:
            class_name (`str`): One of `classes`, or 'all'.
            count (`int`): Images.
            scale (`float`): Of guidance, by the experts where there are some, else classifier-free.
            num_inference_steps (`int`): Denoising steps.
            scheduler (`str`): One of [`SCHEDULERS`].
            seed (`int`): The same for all systems of one noise: what is drawn with it is alike.
            on_step (`Callable`, *optional*): Told after each step.
            guided_by_experts (`bool`): Or not, to compare with.

        Raises:
            ValueError: what the pipeline says of a request that it cannot fulfil.
        """
        # A call has a scheduler of its own, as that has a state; the copy shares the models.
        pipeline = copy.copy(self.pipeline)
        pipeline.scheduler = make_like(pipeline.scheduler, SCHEDULERS[scheduler])
        labels = self.labels(class_name, count)
        if self.experts is None:
            asked = {"class_labels": labels, "batch_size": count, "guidance_scale": scale}
        else:
            asked = {"batch_size": count}
            if guided_by_experts:
                pipeline.scheduler = GuidedScheduler(pipeline.scheduler, self.experts, ClassTarget(labels), scale)

        def step_done(pipeline, step: int, timestep, tensors: dict) -> dict:
            on_step(step + 1, pipeline.num_timesteps)
            return {}

        return pipeline(
            **asked,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator(pipeline.device).manual_seed(seed),
            callback_on_step_end=step_done if on_step else None,
        ).images


def sources(setting: str) -> dict[str, "str | Path"]:
    """
    The pipelines to show by name: the shipped ones, and those of a setting, which take their place where a name is the same.

    Args:
        setting (`str`): 'name=folder-or-hub-id' or plain ids, between commas; a plain id's name is its last part.

    Raises:
        ValueError: if two have one name.
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
                f"Expected each of `DMP_PIPELINES` to have a name of its own, but got another {name!r}; 'name=id' names."
            )
        named[name] = source.strip()
    return found | named


def load_systems(setting: str | None = None) -> tuple[dict[str, System], list[str]]:
    """
    All that load, by name, and a sentence for each that does not.

    Args:
        setting (`str`, *optional*): See [`sources`]; the environment's `DMP_PIPELINES` by default.

    Raises:
        ValueError: if none loads.
    """
    setting = os.environ.get("DMP_PIPELINES", "") if setting is None else setting
    systems, problems = {}, []
    for name, source in sources(setting).items():
        try:
            systems[name] = System.load(name, source)
        except Exception as error:  # whatever it is: the others are shown all the same
            reason = str(error).strip().split("\n")[0][:300]
            problems.append(f"{name} was left out, as {str(source)!r} does not load: {reason or type(error).__name__}")
    if not systems:
        raise ValueError(f"Expected at least one pipeline that loads, but got none. {' '.join(problems)}")
    return systems, problems
