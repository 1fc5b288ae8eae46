"""Commands that draw: samples of a pipeline, and how its parts divide the noise levels."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..diffusion.scheduler_names import SCHEDULERS, scheduler_class
from .pipelines import Folder, load_pipeline
from .program import Command, app

Steps = Annotated[int, typer.Option(min=1, help="Number of denoising steps.")]
MAX_COLUMNS = 10  # classes in a grid by default


@app.command(cls=Command)
def sample(
    pipeline: Folder,
    output: Annotated[Path, typer.Option(help="The image file to write: a grid with one class per column.")] = Path(
        "samples.png"
    ),
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A class, by name, or by index where no class has that name; may be repeated. By default all classes, "
            "at most the first ten."
        ),
    ] = None,
    class_index: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="A class by its index; may be repeated. The index after the last class means no class."
        ),
    ] = None,
    num_images_per_label: Annotated[int, typer.Option(min=1, help="Number of images of each class.")] = 4,
    num_inference_steps: Steps = 50,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Scale of classifier-free guidance; 1 means none. By default the pipeline's own."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}. By default the pipeline's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    pixel_size: Annotated[int, typer.Option(min=1, help="Width of an image's pixel in the grid, in pixels.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Device to compute on, such as cpu or cuda. By default an accelerator, if there is one."),
    ] = None,
) -> None:
    """
    Sample a grid of images.

    diffusers-dmp sample outputs/demo --label 3 --label 8 --guidance_scale 1.5 --pixel_size 6
    """
    import torch
    from diffusers.utils.torch_utils import get_device
    from PIL import Image

    from ..diffusion.schedulers import make_like
    from ..models.precision import check_device
    from ..plots import sample_grid

    if output.suffix.lower() not in Image.registered_extensions() or not output.parent.is_dir():
        raise ValueError(f"Expected `--output` to be an image file in an existing folder, but got {str(output)!r}.")
    chosen = None if scheduler is None else scheduler_class(scheduler)
    pipe = load_pipeline(pipeline)
    labels = _class_indices(pipe, label or [], class_index or [])
    pipe.to(check_device(device or get_device(), "--device"))
    if chosen is not None:
        pipe.scheduler = make_like(pipe.scheduler, chosen)
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    images = pipe(
        class_labels=[each for each in labels for _ in range(num_images_per_label)] or None,
        batch_size=None if labels else num_images_per_label,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator(pipe.device).manual_seed(seed),
        **guidance,
    ).images
    columns = [images[i : i + num_images_per_label] for i in range(0, len(images), num_images_per_label)]
    sample_grid(columns, pixel_size).save(output)
    of_classes = f": {', '.join(_class_name(pipe, index) for index in labels)}" if labels else ""
    typer.echo(f"{len(images)} images in {output}{of_classes}")


@app.command(cls=Command)
def plot(
    pipeline: Folder,
    output_dir: Annotated[Path, typer.Option(help="The folder for the figures.")] = Path("."),
    timestep: Annotated[int | None, typer.Option(min=0, help="A timestep to mark.")] = None,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, help="Number of denoising steps of the sampling that is counted.")
    ] = 50,
) -> None:
    """
    Plot how a pipeline's parts divide the noise levels: routing windows, mixing coefficients, gates, the SNR split, or
    the expert of each step.

    diffusers-dmp plot outputs/demo --timestep 300
    """
    from ..plots import specialisation_figures

    pipe = load_pipeline(pipeline)
    last = pipe.scheduler.config.num_train_timesteps - 1
    if timestep is not None and timestep > last:
        raise ValueError(f"Expected `--timestep` to be at most {last}, but got {timestep}.")
    figures = specialisation_figures(pipe, timestep, num_inference_steps)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output_dir / f"{name}.png", dpi=120)
        typer.echo(output_dir / f"{name}.png")
    if not figures:
        typer.echo("The whole model of this pipeline handles every noise level: there is nothing to plot.")


def _class_indices(pipe: Any, names: list[str], indices: list[int]) -> list[int]:
    """
    The classes to sample: those named, which may be indices where no class has that name, and those given by index.

    Without any, the first classes of the model; none for a model without classes.

    Raises:
        ValueError: if there is no such class.
    """
    from ..models.class_names import checked_class_names, find_class
    from ..models.inputs import has_classes

    if not names and not indices:
        return list(range(min(pipe.num_classes, MAX_COLUMNS))) if has_classes(pipe.num_classes) else []
    if pipe.num_classes is None:
        raise ValueError(
            f"Expected no `--label` and no `--class_index` for a model without classes, but got {[*names, *indices]}."
        )
    id2label = checked_class_names(pipe.config.id2label)
    known = {synonym.strip() for each in id2label.values() for synonym in (each, *each.split(","))}
    last = pipe.num_classes if pipe.has_null_class else pipe.num_classes - 1
    found = []
    given_classes: list[tuple[str, Any]] = [("--label", name) for name in names]
    given_classes += [("--class_index", index) for index in indices]
    for option, given in given_classes:
        is_index = isinstance(given, int) or (given.isdecimal() and given not in known)
        index = int(given) if is_index else find_class(given, id2label, option)
        if index > last:
            listed = [*id2label.values()][:MAX_COLUMNS]
            raise ValueError(
                f"Expected `{option}` to be {'' if option == '--class_index' else 'the name of a class, or '}an index in [0, {last}], "
                f"but got {given}."
                + (f" The index {last} is the null class: no class." if pipe.has_null_class else "")
                + (f" {'Some' if len(id2label) > len(listed) else 'The'} names are {listed}." if listed else "")
            )
        found.append(index)
    return found


def _class_name(pipe: Any, index: int) -> str:
    """A class in words."""
    if index == pipe.num_classes:
        return "no class"
    return (pipe.config.get("id2label") or {}).get(str(index)) or f"class {index}"
