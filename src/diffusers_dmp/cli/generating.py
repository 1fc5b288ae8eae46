"""How `diffusers-dmp guide` calls any pipeline of Diffusers, times its steps, and writes what it generated."""

import inspect
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    Video = list[Image.Image]  # an image is a video of one frame

_COUNTS = ("batch_size", "num_images_per_prompt", "num_videos_per_prompt")  # how pipelines name the number of images
FRAMES_IN_GRID = 8
FRAMES_PER_SECOND = 16  # of an animation, as those of Wan


def call_arguments(pipeline_class: Any, given: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """
    Make the arguments of a pipeline's call.

    Args:
        pipeline_class (`type`): The pipeline's class.
        given (`Mapping`): Arguments by their names in Diffusers; those that are None are left to the pipeline.
        num_images (`int`): How many images to generate.

    Raises:
        ValueError: if the pipeline does not take one of them, or needs others.
    """
    accepted = inspect.signature(pipeline_class.__call__).parameters
    call = {name: value for name, value in given.items() if value is not None}
    name = pipeline_class.__name__
    for argument, value in call.items():
        if argument not in accepted:
            raise ValueError(f"Expected no `--{argument}` for a {name}, which takes none, but got {value!r}.")
    if "prompt" in accepted and "prompt" not in call:
        raise ValueError(f"Expected `--prompt` for a {name}, which generates from a text, but got none.")
    needed = [
        argument
        for argument, parameter in list(accepted.items())[1:]  # without `self`
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if missing := [argument for argument in needed if argument not in (*call, *_COUNTS)]:
        raise ValueError(
            f"Expected a pipeline that generates from a prompt or from noise alone, but a {name} needs `{missing[0]}`."
        )
    count = next((count for count in _COUNTS if count in accepted), None)
    if count is None:
        raise ValueError(f"Expected a pipeline with one of {', '.join(_COUNTS)}, but a {name} takes none of them.")
    return call | {count: num_images}


def steps_of(pipeline_class: Any, call: Mapping[str, Any]) -> int:
    """The number of denoising steps of a call with these arguments."""
    default = inspect.signature(pipeline_class.__call__).parameters["num_inference_steps"].default
    return call.get("num_inference_steps", default)


def generate(pipe: "DiffusionPipeline", call: Mapping[str, Any], seed: int) -> "list[Video]":
    """
    Call a pipeline.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline.
        call (`Mapping`): See [`call_arguments`].
        seed (`int`): Seed of the noise.

    Returns:
        `list[list[PIL.Image.Image]]`: The frames of each video; an image is one frame.
    """
    import torch

    output: Any = pipe(**call, generator=torch.Generator(pipe.device).manual_seed(seed), output_type="pil")
    videos = output.images if hasattr(output, "images") else output.frames
    return [video if isinstance(video, list) else [video] for video in videos]


class StepClock:
    """
    Measure how long a pipeline's denoising steps take, within a `with` block: from one call of the denoiser to the next step's.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline.
    """

    def __init__(self, pipe: "DiffusionPipeline"):
        self.pipe = pipe
        self._began: list[float] = []

    def __enter__(self) -> "StepClock":
        from ..systems import denoisers_of

        self._hooks = ExitStack()
        second = getattr(self.pipe, "transformer_2", None)  # Wan2.2's
        for denoiser in {*denoisers_of(self.pipe), second} - {None}:
            handle = denoiser.register_forward_pre_hook(self._note)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def _note(self, *_: Any) -> None:
        import torch

        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize(self.pipe.device)
        self._began.append(time.perf_counter())

    def seconds_per_step(self, num_steps: int) -> float | None:
        """The mean of all steps but the first, in which kernels are loaded, and the last; None if there are no others."""
        calls = len(self._began)
        per_step = max(
            calls // num_steps, 1
        )  # 2 for some: for classifier-free guidance, or with a second-order scheduler
        first, last = per_step, calls - per_step
        if last <= first:
            return None
        return (self._began[last] - self._began[first]) / (last - first) * calls / num_steps


def save_grid(columns: "list[list[Video]]", path: Path, pixel_size: int = 1) -> None:
    """
    Write images or videos in a grid.

    Videos are animated in a GIF; in any other file each is a strip of some of its frames.

    Args:
        columns (`list[list[list[PIL.Image.Image]]]`): The frames of the videos of each column.
        path (`Path`): The file.
        pixel_size (`int`): The width of an image's pixel in the grid, in pixels.
    """
    from diffusers.utils import export_to_gif

    from ..plots import sample_grid

    count = len(columns[0][0])
    if count > 1 and path.suffix.lower() == ".gif":
        frames = [[[video[index] for video in column] for column in columns] for index in range(count)]
        export_to_gif([sample_grid(frame, pixel_size) for frame in frames], str(path), fps=FRAMES_PER_SECOND)
    elif count > 1:
        shown = min(count, FRAMES_IN_GRID)
        chosen = [round(index * (count - 1) / (shown - 1)) for index in range(shown)]
        strips = [[sample_grid([[video[index]] for index in chosen], gap=0) for video in column] for column in columns]
        sample_grid(strips, pixel_size).save(path)
    else:
        sample_grid([[video[0] for video in column] for column in columns], pixel_size).save(path)
