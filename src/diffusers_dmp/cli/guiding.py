"""The command that guides any pipeline by a vision network."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..diffusion.scheduler_names import SCHEDULERS, scheduler_class
from ..saving.sources import check_source
from .asking import Asked, Column, columns_of, image_size, vision_network
from .generating import StepClock, call_arguments, generate, save_grid, steps_of
from .pipelines import Folder, load_any_pipeline, pipeline_source, saved_pipeline_class
from .program import Command, app

if TYPE_CHECKING:
    from ..guidance import GuidanceExperts
    from .generating import Video


@app.command(cls=Command)
def guide(
    pipeline: Folder,
    output: Annotated[
        Path,
        typer.Option(
            help="The image file to write (also --out): a grid with one column for each thing asked for. A video is animated in "
            "a .gif, and else a strip of frames."
        ),
    ] = Path("guided.png"),
    experts: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the guidance experts that guide; a training's output_dir will do."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Instead of experts, a vision model of transformers as it is, such as microsoft/resnet-50 or "
            "openai/clip-vit-base-patch32."
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="A class of the vision model, by name or index; one column for each if repeated."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text that CLIP or SigLIP finds similar to the images; one column for each if repeated."),
    ] = None,
    depth: Annotated[
        Path | None, typer.Option(help="A photograph whose depth is asked for, of a depth model.")
    ] = None,
    segmentation: Annotated[
        Path | None,
        typer.Option(
            help="A PNG with the index of a class in each pixel, 255 where any will do, for a segmentation model."
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Scale s of the guidance by the vision model.")] = 7.5,
    timestep_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Guide only the training timesteps LOW <= t < HIGH. By default all, and for flow matching those below 0.95 T.",
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Guide every n-th step.")] = 1,
    frames: Annotated[
        list[int] | None,
        typer.Option(
            help="A frame of a video that the vision model sees; may be repeated. By default the first, the middle and the last."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt of a text pipeline.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Its negative prompt.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images in each column, generated at once.")] = 1,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of denoising steps. By default the pipeline's own.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of the pipeline's own guidance. By default the pipeline's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height of the images, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Width of the images, in pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Number of frames of a video.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}. By default the pipeline's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, which is the same in all columns.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put a column before them without guidance, from the same noise.")
    ] = False,
    pixel_size: Annotated[int, typer.Option(min=1, help="Width of an image's pixel in the grid, in pixels.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Device to compute on, such as cpu or cuda. By default an accelerator, if there is one."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the pipeline: float32, float16 or bfloat16.")] = "float32",
) -> None:
    """
    Guide any pipeline by a vision model: towards a class, a text, a depth map or a segmentation.

    diffusers-dmp guide stabilityai/stable-diffusion-3.5-medium --prompt "an animal" --network microsoft/resnet-50
    --class zebra --dtype bfloat16 --compare --out zebra.png
    """
    asked = Asked(classes or [], text or [], depth, segmentation)
    asked.check()
    _check_options(output, experts, network, dtype)
    settings = {"scale": scale, "timestep_range": timestep_range, "every": every, "frames": frames or None}
    _check_numbers(settings, guidance_scale)
    chosen = None if scheduler is None else scheduler_class(scheduler)
    source = pipeline_source(pipeline)
    given = {
        "prompt": prompt, "negative_prompt": negative_prompt, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "height": height, "width": width, "num_frames": num_frames,
    }  # fmt: skip
    pipeline_class = saved_pipeline_class(source)
    if pipeline_class is not None:
        call_arguments(pipeline_class, given, num_images)  # before anything heavy is loaded
    vision = vision_network(experts, network, source)
    columns = columns_of(asked, vision, image_size(vision, source, height, width))
    pipe = load_any_pipeline(source, dtype, device, chosen)
    call = call_arguments(type(pipe), given, num_images)
    runs = _run(pipe, vision, columns, call, seed, settings, compare)
    save_grid([run.videos for run in runs], output, pixel_size)
    typer.echo(_summary(output, vision, columns, runs[1:] if compare else runs, runs[0] if compare else None))


@dataclass(frozen=True)
class _Run:
    """What one call of the pipeline generated, how long a step took, and the peak of the accelerator's memory."""

    videos: "list[Video]"
    seconds_per_step: float | None
    peak_gibibytes: float | None


def _run(
    pipe: Any,
    vision: "GuidanceExperts",
    columns: list[Column],
    call: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    compare: bool,
) -> list[_Run]:
    """Generate each column from the same noise; with `compare` first one without guidance."""
    from ..guidance import GuidedScheduler

    guided = GuidedScheduler.for_pipeline(pipe, vision, columns[0].target, **settings)
    runs = [_timed(pipe, call, seed)] if compare else []
    pipe.scheduler = guided
    try:
        for column in columns:
            pipe.scheduler.target = column.target
            runs.append(_timed(pipe, call, seed))
    except FloatingPointError as error:
        found = str(error).partition(" `on_nonfinite")[0]
        raise ValueError(f"{found} A smaller `--scale` or another `--timestep_range` may help.") from error
    return runs


def _timed(pipe: Any, call: dict[str, Any], seed: int) -> _Run:
    import torch

    on_cuda = pipe.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with StepClock(pipe) as clock:
        videos = generate(pipe, call, seed)
    peak = torch.cuda.max_memory_allocated(pipe.device) / 2**30 if on_cuda else None
    return _Run(videos, clock.seconds_per_step(steps_of(type(pipe), call)), peak)


def _summary(
    output: Path, vision: "GuidanceExperts", columns: list[Column], guided: list[_Run], unguided: _Run | None
) -> str:
    """One line: how many images of what, what the network sees in them, and what it cost."""
    videos = [run.videos for run in guided]
    count, frames = sum(map(len, videos)), len(videos[0][0])
    kind = ("image" if frames == 1 else "video") + ("" if count == 1 else "s")
    is_class = columns[0].class_index is not None
    seen = f"{'recognises' if is_class else 'log p ='} {_judged(vision, columns, videos)}"
    if unguided is not None:
        seen += f" (unguided {_judged(vision, columns, [unguided.videos] * len(columns))})"
    parts = [
        f"{count} guided {kind} in {output}: {', '.join(column.title for column in columns)}",
        f"{vision.config.base_model_class}: {seen}",
    ]
    seconds = [run.seconds_per_step for run in guided if run.seconds_per_step is not None]
    if unguided is not None and unguided.seconds_per_step is not None and seconds:
        mean = sum(seconds) / len(seconds)
        parts.append(f"{mean:.3g} s per step (unguided {unguided.seconds_per_step:.3g} s)")
    peaks = [run.peak_gibibytes for run in guided if run.peak_gibibytes is not None]
    if peaks:
        compared = f" (unguided {unguided.peak_gibibytes:.1f} GiB)" if unguided is not None else ""
        parts.append(f"peak memory {max(peaks):.1f} GiB{compared}")
    return "; ".join(parts)


def _judged(vision: "GuidanceExperts", columns: list[Column], videos: "list[list[Video]]") -> str:
    """What the network that guides sees in all columns: in how many the class, or else the mean of log p(asked)."""
    judged = [column.judge(vision, each) for column, each in zip(columns, videos)]
    if columns[0].class_index is not None:
        return f"{sum(recognised for _, recognised in judged)} of {sum(map(len, videos))}"
    return f"{sum(log_likelihood for log_likelihood, _ in judged) / len(judged):.4g}"


def _check_numbers(settings: dict[str, Any], guidance_scale: float | None) -> None:
    """Check the guidance of the vision model, and the scale of the pipeline's own, before anything is loaded."""
    for name, value in (("scale", settings["scale"]), ("guidance_scale", guidance_scale)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"Expected `--{name}` to be a finite number, but got {value}.")

    from ..guidance.gradient import check_setting

    check_setting("timestep_range", settings["timestep_range"])


def _check_options(output: Path, experts: str | None, network: str | None, dtype: str) -> None:
    """Check what can be checked at once."""
    from PIL import Image

    from ..models.precision import dtype_named

    format_name = Image.registered_extensions().get(output.suffix.lower())
    if format_name not in Image.SAVE or not output.parent.is_dir():  # Pillow reads more formats than it writes
        raise ValueError(f"Expected `--output` to be an image file in an existing folder, but got {str(output)!r}.")
    if (experts is None) == (network is None):
        raise ValueError(
            "Expected one vision model that guides, trained `--experts` or a `--network` as it is, but got "
            f"{'neither' if experts is None else 'both'}."
        )
    dtype_named(dtype, argument="--dtype")  # raises for an unknown one
    check_source("--experts", experts, repo_type="model")
    check_source("--network", network, repo_type="model")
