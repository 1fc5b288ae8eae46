"""What a pipeline is called with to sample the images of an evaluation: prompts or classes in turn, and what all calls share."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from ..models.inputs import has_classes
from .prompts import PROMPT, prompts_of

# by the image's index and the seed, or set here
_OWN = (
    PROMPT,
    "class_labels",
    "generator",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "output_type",
    "return_dict",
)


@dataclass(frozen=True)
class Requests:
    """
    The arguments of a pipeline's calls.

    Args:
        shared (`Mapping[str, Any]`): Those of every call.
        prompts (`Sequence[str]`, *optional*): Image i has prompt i modulo their number.
        num_classes (`int`, *optional*): Image i has class i modulo this.
    """

    shared: Mapping[str, Any]
    prompts: Sequence[str] | None = None
    num_classes: int | None = None

    def __call__(self, indices: range) -> dict[str, Any]:
        """Return the arguments of the call that samples the images with these indices."""
        # one text for all prompts: not all pipelines repeat it
        arguments = {
            name: [value] * len(indices) if _is_text(name, value) else value for name, value in self.shared.items()
        }
        named: dict[str, Any] = {PROMPT: self.prompts_of(indices), "class_labels": self.labels_of(indices)}
        own = {name: values for name, values in named.items() if values is not None}
        return arguments | (own or {"batch_size": len(indices)})

    def prompts_of(self, indices: range) -> list[str] | None:
        """Return the prompts of images; None for a pipeline without."""
        return None if self.prompts is None else prompts_of(indices, self.prompts)

    def labels_of(self, indices: range) -> list[int] | None:
        """Return the classes of images; None for a pipeline without."""
        return None if self.num_classes is None else [index % self.num_classes for index in indices]


def make_requests(
    pipeline: DiffusionPipeline, prompts: Sequence[str] | None, optional: Mapping[str, Any], **shared: Any
) -> Requests:
    """
    Check what a pipeline's call accepts, and choose what it is called with.

    A pipeline of videos makes one frame, unless `optional` has `num_frames`.

    Args:
        pipeline (`DiffusionPipeline`): Any pipeline of text, of classes, or without conditions.
        prompts (`Sequence[str]`, *optional*): For a pipeline of text.
        optional (`Mapping[str, Any]`): Arguments that a user gave.
        shared: Further arguments, left out where the pipeline has no such.

    Raises:
        ValueError: if there are prompts and the pipeline takes none, or the reverse; if the pipeline takes no generators, or
            does not have an argument in `optional`.
    """
    name, accepted = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    is_of_text = PROMPT in accepted
    if prompts is not None and not is_of_text:
        raise ValueError(f"Expected no `prompts` for a {name}, which is not called with prompts, but got some.")
    if prompts is None and is_of_text:
        raise ValueError(f"Expected `prompts` for a {name}, a file with one prompt in each line, but got nothing.")
    if "generator" not in accepted:
        raise ValueError(
            f"Expected a pipeline that takes random generators, but got a {name}, which has no `generator`."
        )
    valid = [each for each in accepted if each not in _OWN]
    unknown = [each for each in optional if each not in valid]
    if unknown:
        raise ValueError(f"Expected arguments of the {name}'s call, {', '.join(valid)}, but got {', '.join(unknown)}.")
    if is_of_text:
        shared |= {"output_type": "pil", "num_frames": 1}
    shared = {each: value for each, value in shared.items() if each in accepted} | dict(optional)
    num_classes = getattr(pipeline, "num_classes", None)
    return Requests(shared, prompts, num_classes if has_classes(num_classes) and not is_of_text else None)


def _is_text(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.startswith(("negative_prompt", "prompt_"))
