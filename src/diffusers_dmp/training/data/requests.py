"""What a pipeline is called with to sample many images: prompts or classes in turn, and what all calls share."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from ...models.inputs import has_classes
from ..arguments import option
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


@dataclass(kw_only=True)
class CallArguments:
    """What a pipeline is called with."""

    prompts: str | None = option(
        None,
        "For a pipeline of text: a .txt file with one prompt in each line, or a .jsonl, .json, .csv or .parquet file.",
    )
    prompt_column: str = option(PROMPT, "Column of prompts, if the file has columns.")
    guidance_scale: float | None = option(None, "Scale of classifier-free guidance; by default the pipeline's own.")
    height: int | None = option(None, "Height of the images in pixels; by default the pipeline's own.")
    width: int | None = option(None, "Width of the images in pixels; by default the pipeline's own.")
    pipeline_arguments: str | None = option(
        None,
        'Further arguments of the pipeline\'s call, as JSON; for example {"true_cfg_scale": 4, "negative_prompt": " "}.',
    )

    def check_call(self) -> None:
        """
        Check what is known without the pipeline.

        Raises:
            ValueError: if a size is below 1, or `pipeline_arguments` are no JSON object.
        """
        for name in ("height", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {getattr(self, name)}.")
        self.further_arguments()

    def further_arguments(self) -> dict[str, Any]:
        """Return `pipeline_arguments` as a dictionary."""
        try:
            found = json.loads(self.pipeline_arguments or "{}")
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f'Expected `pipeline_arguments` to be a JSON object such as {{"true_cfg_scale": 4}}, but got '
                f"{self.pipeline_arguments!r}."
            )
        return found

    def given(self, *names: str) -> dict[str, Any]:
        """Return the fields of these names that are given."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


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
    pipeline: DiffusionPipeline,
    prompts: Sequence[str] | None,
    optional: Mapping[str, Any],
    classes_in_turn: bool = True,
    **shared: Any,
) -> Requests:
    """
    Check what a pipeline's call accepts, and choose what it is called with.

    A pipeline of videos makes one frame, unless `optional` has `num_frames`.

    Args:
        pipeline (`DiffusionPipeline`): Any pipeline of text, of classes, or without conditions.
        prompts (`Sequence[str]`, *optional*): For a pipeline of text.
        optional (`Mapping[str, Any]`): Arguments that a user gave.
        classes_in_turn (`bool`): Whether a pipeline of classes samples them in turn; otherwise without, or those in `optional`.
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
    own = [each for each in _OWN if classes_in_turn or each != "class_labels"]
    valid = [each for each in accepted if each not in own]
    unknown = [each for each in optional if each not in valid]
    if unknown:
        raise ValueError(f"Expected arguments of the {name}'s call, {', '.join(valid)}, but got {', '.join(unknown)}.")
    if is_of_text:
        shared |= {"output_type": "pil", "num_frames": 1}
    shared = {each: value for each, value in shared.items() if each in accepted} | dict(optional)
    num_classes = getattr(pipeline, "num_classes", None)
    has_turns = classes_in_turn and has_classes(num_classes) and not is_of_text
    return Requests(shared, prompts, num_classes if has_turns else None)


def _is_text(name: str, value: Any) -> bool:
    return isinstance(value, str) and name.startswith(("negative_prompt", "prompt_"))
