"""What `diffusers-dmp guide` asks a vision network for, from the options of its command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .maps import depth_target, read_class_map, read_photograph, segmentation_target
from .pipelines import saved_sample_size

if TYPE_CHECKING:
    from PIL import Image

    from ..guidance import GuidanceExperts, GuidanceTarget

_BLANK_SIZE = (224, 224)  # of an image that a network resizes anyway


@dataclass(frozen=True)
class Asked:
    """
    What the options ask for.

    Args:
        classes (`list[str]`): `--class`, by name or index.
        texts (`list[str]`): `--text`.
        depth (`Path`, *optional*): `--depth`, a photograph.
        segmentation (`Path`, *optional*): `--segmentation`, an image of class indices.
    """

    classes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    depth: Path | None = None
    segmentation: Path | None = None

    def check(self) -> None:
        """
        Check what can be checked without a network.

        Raises:
            ValueError: if nothing is asked for, or classes and texts are both more than one.
            OSError: if a file is no image.
        """
        if not (self.classes or self.texts or self.depth or self.segmentation):
            raise ValueError(
                "Expected `--class`, `--text`, `--depth` or `--segmentation` to ask for something, but got none."
            )
        if len(self.classes) > 1 and len(self.texts) > 1:
            raise ValueError(
                "Expected several of `--class` or of `--text`, one for each column of the grid, but got several of both."
            )
        if self.depth is not None:
            read_photograph(self.depth)
        if self.segmentation is not None:
            read_class_map(self.segmentation)


@dataclass(frozen=True)
class Column:
    """
    One column of the grid.

    Args:
        title (`str`): What its images are guided to, in words.
        target ([`GuidanceTarget`]): The same for the network that guides.
        class_index (`int`, *optional*): The class, if one is asked for.
    """

    title: str
    target: "GuidanceTarget"
    class_index: int | None = None

    def judge(self, vision: "GuidanceExperts", videos: "list[list[Image.Image]]") -> tuple[float, int]:
        """
        Let the network that guides look at what was generated.

        Returns:
            The mean of log p(asked), and in how many images the network recognises the class.
        """
        import torch

        from ..training.data.fitting import to_tensor

        total, recognised = 0.0, 0
        for frames in videos:
            pixels = torch.stack([to_tensor(frame) for frame in frames]).to(vision.device)
            with torch.no_grad():
                output = vision(pixels, torch.tensor(0))
                total += self.target.log_likelihood(output).mean().item()
            if self.class_index is not None:
                recognised += int(output.logits.log_softmax(-1).mean(0).argmax()) == self.class_index
        return total / len(videos), recognised


def vision_network(experts: str | None, network: str | None, pipeline: str) -> "GuidanceExperts":
    """The network that guides: trained experts, or one network as it is, which has the pipeline's number of timesteps."""
    from diffusers import DDPMScheduler

    from ..guidance import GuidanceExperts

    if experts is not None:
        nested = Path(experts, "experts")
        return GuidanceExperts.from_pretrained(str(nested) if nested.is_dir() else experts)
    config = DDPMScheduler.load_config(pipeline, subfolder="scheduler")  # of any scheduler
    count = config.get("model_train_timesteps") or config.get("num_train_timesteps") or 1000
    timesteps = {} if count == 1 else {"num_train_timesteps": count}
    return GuidanceExperts.from_base(str(network), num_experts=1, method="finetune", **timesteps)


def image_size(
    vision: "GuidanceExperts", source: str, height: int | None, width: int | None
) -> tuple[int, int] | None:
    """Height and width of the images that the network will see, if they are known without loading the pipeline."""
    if height is not None and width is not None:
        return height, width
    size = vision.config.get("sample_size") or saved_sample_size(source)
    return (size, size) if isinstance(size, int) else size and (size[0], size[1])


def columns_of(asked: Asked, vision: "GuidanceExperts", size: tuple[int, int] | None) -> list[Column]:
    """
    Make the targets, one for each column of the grid: classes and texts are one column each, all else is asked of every column.

    Each target is tried on a blank image, so that a network that cannot answer is refused before the pipeline is loaded.

    Args:
        asked ([`Asked`]): What the options ask for.
        vision ([`GuidanceExperts`]): The network that guides.
        size (`tuple[int, int]`, *optional*): Height and width of the images that it will see, in pixels, where they are known.

    Raises:
        ValueError: if there is no such class (similar names are listed), or the network does not return what a target needs.
    """
    from ..guidance import ClassTarget, WeightedTargets

    blank = _answer_to_blank(vision, size)
    maps = []
    if asked.depth is not None:
        maps.append(Column(f"the depth of {asked.depth.name}", depth_target(asked.depth, vision, size, blank)))
    if asked.segmentation is not None:
        wanted = segmentation_target(asked.segmentation, vision, size, blank)
        maps.append(Column(f"the map {asked.segmentation.name}", wanted))
    if asked.classes:
        _try(ClassTarget(0), vision, blank)
    classes = []
    for index in [class_index(given, vision.network_config) for given in asked.classes]:
        classes.append(Column(class_name(index, vision.network_config), ClassTarget(index), index))
    texts = [_text_column(text, vision) for text in asked.texts]
    columns = []
    for number in range(max(len(classes), len(texts), 1)):
        parts = [each[number if len(each) > 1 else 0] for each in (classes, texts) if each] + maps
        target = parts[0].target if len(parts) == 1 else WeightedTargets([(part.target, 1.0) for part in parts])
        _try(target, vision, blank)
        columns.append(Column(" and ".join(part.title for part in parts), target, parts[0].class_index))
    return columns


def _try(target: "GuidanceTarget", vision: "GuidanceExperts", blank: Any) -> None:
    """Refuse a target that the network cannot be asked for."""
    target.prepare(vision.network_config)
    if blank is not None:
        target.log_likelihood(blank)


def class_index(given: str, network_config: Any) -> int:
    """
    Find a class by its name, or by its index where no class has that name.

    Raises:
        ValueError: if there is no such class; similar names are listed.
    """
    from ..models.class_names import checked_class_names, find_class

    names = checked_class_names(network_config.id2label)
    known = {synonym.strip() for name in names.values() for synonym in (name, *name.split(","))}
    if given in known or not given.isdecimal():
        return find_class(given, names, "--class")
    count = network_config.num_labels  # 0 where it is not known before the first output
    if count and int(given) >= count:
        raise ValueError(
            f"Expected `--class` to be a class of the network that guides, whose indices are in [0, {count - 1}], but got {given}."
        )
    return int(given)


def class_name(index: int, network_config: Any) -> str:
    """A class in words: the first of its names."""
    names: Mapping[Any, str] = network_config.id2label or {}
    return names.get(index, f"class {index}").split(",")[0]


def _text_column(text: str, vision: "GuidanceExperts") -> Column:
    """A text as the model of images and text reads it whose images the network sees."""
    from ..guidance import TextTarget

    name, revision = vision.config.base_model_name_or_path, vision.config.base_model_revision
    return Column(f'"{text}"', TextTarget.from_pretrained(name, text, **({"revision": revision} if revision else {})))


def _answer_to_blank(vision: "GuidanceExperts", size: tuple[int, int] | None) -> Any:
    """The network's output for one grey image; None if it is not known which size it will see."""
    import torch

    if size is None and vision.config.image_size is None:
        return None
    channels = getattr(vision.network_config, "num_channels", 3)
    with torch.no_grad():
        return vision(torch.zeros(1, channels, *(size or _BLANK_SIZE)), torch.tensor(0))
