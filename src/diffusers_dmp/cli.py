"""`diffusers-dmp`: sample images, convert published weights, publish, plot, diagnose, and describe a folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from .diffusion.schedulers import SCHEDULERS, make_like
from .systems import SYSTEMS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Each command imports the rest itself, so that `--help` answers at once.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", help=__doc__)

Folder = Annotated[str, typer.Argument(help="A folder, a training's `output_dir`, or a Hub id such as user/name.")]
MAX_COLUMNS = 10  # classes in a grid by default
PUBLISHED = (*SYSTEMS, "adm")  # whose original checkpoints can be converted


@app.command()
def sample(
    pipeline: Folder,
    output: Annotated[Path, typer.Option(help="The image file to write: a grid with one class per column.")] = Path(
        "samples.png"
    ),
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="A class, by index or name; may be repeated. By default all classes, at most the first ten."
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Number of images of each class.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 50,
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

    diffusers-dmp sample outputs/demo --label 3 --label 8 --guidance-scale 1.5 --pixel-size 6
    """
    import torch
    from diffusers.utils.torch_utils import get_device
    from PIL import Image

    from .models.inputs import has_classes
    from .plots import sample_grid

    if output.suffix.lower() not in Image.registered_extensions() or not output.parent.is_dir():
        raise ValueError(f"Expected `--output` to be an image file in an existing folder, but got {str(output)!r}.")
    schedulers = {name.lower(): class_name for name, class_name in SCHEDULERS.items()}
    if scheduler is not None and scheduler.lower() not in schedulers:
        raise ValueError(f"Expected `--scheduler` to be one of {', '.join(SCHEDULERS)}, but got {scheduler!r}.")
    pipe = load_pipeline(pipeline)
    try:
        pipe.to(device or get_device())
    except RuntimeError as error:
        raise ValueError(f"Expected `--device` to be a device of this computer, but got {device!r}.") from error
    if scheduler is not None:
        pipe.scheduler = make_like(pipe.scheduler, schedulers[scheduler.lower()])
    labels = [int(each) if each.isdecimal() else pipe.get_label_ids(each)[0] for each in label or []]
    if not labels and has_classes(pipe.num_classes):
        labels = list(range(min(pipe.num_classes, MAX_COLUMNS)))
    guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    images = pipe(
        class_labels=[each for each in labels for _ in range(per_class)] or None,
        batch_size=per_class,
        num_inference_steps=steps,
        generator=torch.Generator(pipe.device).manual_seed(seed),
        **guidance,
    ).images
    sample_grid([images[i : i + per_class] for i in range(0, len(images), per_class)], pixel_size).save(output)
    typer.echo(f"{len(images)} images in {output}")


@app.command()
def convert(
    system: Annotated[str, typer.Argument(help=f"The code that wrote the checkpoint: {', '.join(PUBLISHED)}.")],
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="The checkpoint's file; for ppap one file per expert, the expert of the cleanest images first; or the "
            "folder of a model of this package with pickled weights."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings that the weights do not show, such as the number of heads."),
    ] = None,
) -> None:
    """
    Convert a published checkpoint to safetensors. Pickles are read with `weights_only=True`: tensors, no code.

    diffusers-dmp convert dit DiT-XL-2-256x256.pt --output dit-xl-2
    """
    from .conversion.original import convert_file
    from .plugins.attachment import patch_of
    from .saving.reading import read_yaml

    settings = read_yaml(config) if config else {}
    if system not in PUBLISHED:
        raise ValueError(f"Expected `system` to be one of {', '.join(PUBLISHED)}, but got {system!r}.")
    is_guidance = system in SYSTEMS and SYSTEMS[system].is_guidance
    if len(checkpoints) > 1 and not is_guidance:
        raise ValueError(f"Expected one checkpoint of {system}, but got {len(checkpoints)}.")
    if checkpoints[0].is_dir():
        _convert_folder(system, checkpoints[0], output)
    elif is_guidance:
        settings = {"base_model_folder": output / "base_model"} | settings
        convert_file(system, checkpoints, settings).save_pretrained(output)
    else:
        model = convert_file(system, checkpoints[0], settings)
        patch = patch_of(model)
        if patch is None:
            model.save_pretrained(output)
        else:
            patch.detach().save_pretrained(output / "patch")
            model.save_pretrained(output / "transformer")
    typer.echo(f"Written to {output}")


@app.command()
def publish(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A training's `output_dir`, or the folder of a pipeline, model, prompts or guidance experts."
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="The repository: user/name.")],
    license: Annotated[str, typer.Option(help="Licence of the weights: apache-2.0, mit, cc-by-nc-4.0, …")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Replace everything in an existing repository, its card too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that it was made from.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set that it was trained on.")] = None,
) -> None:
    """
    Upload to the Hugging Face Hub: weights, code for users without this package, and a model card.

    diffusers-dmp publish outputs/demo user/dtr-digits --license apache-2.0 --dry-run
    """
    from .hub.publishing import publish

    published = publish(
        folder,
        repo_id,
        license=license,
        private=private,
        update=update,
        dry_run=dry_run,
        base_model=base_model,
        dataset=dataset,
    )
    for name, size in published.sizes.items():
        typer.echo(f"{size:>12,}  {name}")
    typer.echo(f"\n{published.card}" if dry_run else f"Published at {published.url}")


@app.command()
def plot(
    pipeline: Folder,
    output: Annotated[Path, typer.Option(help="The folder for the figures.")] = Path("."),
    timestep: Annotated[int | None, typer.Option(min=0, help="A timestep to mark.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps of the sampling that is counted.")] = 50,
) -> None:
    """
    Plot how a pipeline's parts divide the noise levels: routing windows, mixing coefficients, gates, or the SNR split.

    diffusers-dmp plot outputs/demo --timestep 300
    """
    from .plots import specialisation_figures

    pipe = load_pipeline(pipeline)
    last = pipe.scheduler.config.num_train_timesteps - 1
    if timestep is not None and timestep > last:
        raise ValueError(f"Expected `--timestep` to be at most {last}, but got {timestep}.")
    figures = specialisation_figures(pipe, timestep, steps)
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=120)
        typer.echo(output / f"{name}.png")
    if not figures:
        typer.echo("The whole model of this pipeline handles every noise level: there is nothing to plot.")


@app.command()
def diagnose(
    pipeline: Folder,
    dataset: Annotated[
        str, typer.Option(help="Images to denoise: a folder, parquet files, or the Hub id of a data set.")
    ],
    output: Annotated[Path, typer.Option(help="The folder for diagnosis.json and diagnosis.png.")] = Path("."),
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    images: Annotated[int, typer.Option(min=1, help="Number of images to use.")] = 256,
    bands: Annotated[int, typer.Option(min=1, help="Number of bands that the timesteps are divided into.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps of the sampling that is counted.")] = 50,
) -> None:
    """
    Measure what each expert is good at: its loss at every noise level, the loss if another takes its place, its use.

    diffusers-dmp diagnose outputs/patch_digits --dataset outputs/demo/digits
    """
    import json

    from diffusers.utils.torch_utils import get_device

    from .evaluation.diagnostics import diagnose
    from .plots import diagnosis_figure
    from .saving.reading import read_json
    from .training.data.images import load_images

    pipe = load_pipeline(pipeline).to(get_device())
    summary = Path(pipeline, "training_summary.json")
    training = read_json(summary) if summary.is_file() else None
    diagnosis = diagnose(pipe, load_images(dataset, split=split), images, bands, steps, training)
    output.mkdir(parents=True, exist_ok=True)
    diagnosis_figure(diagnosis).savefig(output / "diagnosis.png", dpi=120)
    (output / "diagnosis.json").write_text(json.dumps(diagnosis.as_dict(), indent=2) + "\n", encoding="utf-8")
    for owner, row in enumerate(diagnosis.swap_losses):
        typer.echo(
            f"interval of expert {owner}: " + ", ".join(f"{loss:.4f} by {other}" for other, loss in enumerate(row))
        )
    typer.echo(f"{output / 'diagnosis.json'}, {output / 'diagnosis.png'}")


@app.command()
def info(folder: Folder) -> None:
    """
    Describe a folder: system, intervals, training, evaluation. Weights are neither loaded nor downloaded.

    diffusers-dmp info outputs/demo
    """
    from .hub.folders import read_folder

    typer.echo(yaml.safe_dump(read_folder(_local(folder)).summary(), sort_keys=False, allow_unicode=True).rstrip())


def load_pipeline(name: str) -> "DiffusionPipeline":
    """
    Load a [`ClassConditionalPipeline`] or [`SNRSplitPipeline`] from its folder, from a training's `output_dir`, or from the Hub.

    Raises:
        ValueError: if it is not a pipeline of this package.
    """
    from diffusers import DiffusionPipeline

    import diffusers_dmp

    from .saving.finite import expect_finite_pipeline
    from .saving.weight_files import check_saved_folder

    nested = Path(name, "pipeline")
    folder = nested if nested.is_dir() else Path(name)
    check_saved_folder(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder if folder.is_dir() else name)
    if not isinstance(pipeline, (diffusers_dmp.ClassConditionalPipeline, diffusers_dmp.SNRSplitPipeline)):
        raise ValueError(
            f"Expected {name!r} to hold a ClassConditionalPipeline or SNRSplitPipeline, but got a {type(pipeline).__name__}."
        )
    expect_finite_pipeline(pipeline, folder)
    return pipeline


def main() -> None:
    """Run the command line; a user's error is reported in one line."""
    try:
        app()
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        typer.secho(f"diffusers-dmp: {' '.join(str(error).split())}", fg="red", err=True)
        raise SystemExit(2) from error


def _local(name: str) -> Path:
    """The folder itself, or a download of a repository's configurations and records."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.yaml"]
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=patterns))


def _convert_folder(system: str, folder: Path, output: Path) -> None:
    """Convert a model's folder with pickled weights into one with safetensors."""
    import diffusers_dmp

    from .conversion import load_original_state_dict
    from .hub.folders import read_folder
    from .saving.finite import expect_finite_weights
    from .saving.weight_files import saved_files

    contents = read_folder(folder)
    if contents.system != system or contents.is_pipeline or SYSTEMS[system].is_guidance:
        hint = "; convert its components one by one" if contents.is_pipeline else ""
        raise ValueError(f"Expected the folder of a model of {system}, but got that of a {contents.class_name}{hint}.")
    for file in saved_files(contents.path, "*.bin", components=False):  # Diffusers does not say what is wrong with one
        expect_finite_weights(load_original_state_dict(file), file)
    model_class = getattr(diffusers_dmp, contents.class_name)
    model_class.from_pretrained(contents.path, use_safetensors=False).save_pretrained(output)
