"""`diffusers-dmp`: train, sample images, convert published weights, export checkpoints, publish, plot, diagnose, describe."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from typer.core import TyperCommand

from .diffusion.scheduler_names import SCHEDULERS, scheduler_class
from .saving.sources import check_source
from .saving.version import __version__
from .systems import SYSTEMS
from .terminal import DEBUG, DEBUG_HELP, INTERRUPTED, run_command, with_new_names
from .training.scripts import find_preset, script_path

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAME = "diffusers-dmp"
RENAMED = {  # options, by their names up to 0.2
    "sample": {"per_class": "num_images_per_label", "steps": "num_inference_steps"},
    "convert": {"output": "output_dir"},
    "plot": {"output": "output_dir", "steps": "num_inference_steps"},
    "diagnose": {
        "output": "output_dir", "split": "dataset_split", "images": "num_images", "bands": "num_bands",
        "steps": "num_inference_steps",
    },
}  # fmt: skip
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, of which Typer may have a copy


class Command(TyperCommand):
    """A command whose options are spelled as those of the training scripts: with underscores; hyphens are understood."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            parameter.opts = [_with_underscores(option) for option in parameter.opts]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command.parse_args`."""
        args = with_new_names([_with_underscores(argument) for argument in args], RENAMED.get(self.name or "", {}))
        return super().parse_args(ctx, args)


class ScriptCommand(TyperCommand):
    """A command whose whole command line, `--help` too, is that of a script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command.parse_args`."""
        return super().parse_args(ctx, ["--", *args])


# Each command imports what else it needs itself, so that `--help`, and a typing error, are answered at once.
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

Folder = Annotated[str, typer.Argument(help="A folder, a training's `output_dir`, or a Hub id such as user/name.")]
Steps = Annotated[int, typer.Option(min=1, help="Number of denoising steps.")]
MAX_COLUMNS = 10  # classes in a grid by default
SCRIPTS = {system.key: system.training_script for system in SYSTEMS.values() if system.training_script is not None}
PUBLISHED = (*SCRIPTS, "adm")  # whose original checkpoints can be converted
TRAINABLE = SCRIPTS | {SYSTEMS[key].short_name: script for key, script in SCRIPTS.items()}


@app.callback(invoke_without_command=True, help=__doc__)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help=f"{DEBUG_HELP} Anywhere in the command line.")] = False,
) -> None:
    """What the program itself can be asked; `--debug` is taken out of the command line by [`run_command`]."""
    if version:
        typer.echo(f"{NAME} {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def train(
    system: Annotated[str, typer.Argument(help=f"What to train: {', '.join(SCRIPTS)}.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="The arguments of the training; options of `accelerate launch` come first, and end with `--`."
        ),
    ] = None,
) -> None:
    """
    Train a system, through `accelerate launch`. `diffusers-dmp train dtr --help` explains its arguments.

    diffusers-dmp train dtr --config dtr_rgb32 --dataset path/to/images --output_dir outputs/mine

    diffusers-dmp train dtr --multi_gpu --num_processes 2 -- --config dtr_imagenet256
    """
    if system not in TRAINABLE:
        raise ValueError(f"Expected `system` to be one of {', '.join(SCRIPTS)}, but got {system!r}.")
    _run_script(TRAINABLE[system], arguments or [])


@app.command("encode_latents", cls=ScriptCommand)
def encode_latents(arguments: Annotated[list[str] | None, typer.Argument(help="As for `train`.")] = None) -> None:
    """
    Encode a data set with a VAE, once, for any training in latent space. `--help` explains its arguments.

    diffusers-dmp encode_latents --dataset path/to/images --vae stabilityai/sd-vae-ft-ema --output_dir outputs/latents
    """
    _run_script("encode_latents", arguments or [])


@app.command("encode_prompts", cls=ScriptCommand)
def encode_prompts(arguments: Annotated[list[str] | None, typer.Argument(help="As for `train`.")] = None) -> None:
    """
    Encode images and their captions with a text-to-image pipeline's VAE and text encoders, once. `--help` explains its arguments.

    diffusers-dmp encode_prompts --pipeline path/to/pipeline --dataset path/to/images --output_dir outputs/encoded
    """
    _run_script("encode_prompts", arguments or [])


@app.command("generate_guidance_data", cls=ScriptCommand)
def generate_guidance_data(
    arguments: Annotated[list[str] | None, typer.Argument(help="As for `train`.")] = None,
) -> None:
    """
    Generate the images that guidance experts (PPAP) are trained on. `--help` explains its arguments.

    diffusers-dmp generate_guidance_data --pipeline outputs/unconditional/pipeline --output_dir outputs/guidance_data
    """
    _run_script("generate_guidance_data", arguments or [])


@app.command(cls=Command)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A training's checkpoint, such as outputs/demo/checkpoint-600.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    no_ema: Annotated[
        bool, typer.Option("--no_ema", help="The weights as the optimiser left them, not their average.")
    ] = False,
) -> None:
    """
    Make a pipeline of a training's checkpoint; for PPAP the experts.

    diffusers-dmp export outputs/demo/checkpoint-600 outputs/demo_600
    """
    from .training.export import export_checkpoint

    export_checkpoint(checkpoint, folder, use_ema=not no_ema)
    typer.echo(f"Written to {folder}")


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

    from .diffusion.schedulers import make_like
    from .plots import sample_grid

    if output.suffix.lower() not in Image.registered_extensions() or not output.parent.is_dir():
        raise ValueError(f"Expected `--output` to be an image file in an existing folder, but got {str(output)!r}.")
    chosen = None if scheduler is None else scheduler_class(scheduler)
    pipe = load_pipeline(pipeline)
    labels = _class_indices(pipe, label or [], class_index or [])
    try:
        pipe.to(device or get_device())
    except RuntimeError as error:
        raise ValueError(f"Expected `--device` to be a device of this computer, but got {device!r}.") from error
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
def convert(
    system: Annotated[str, typer.Argument(help=f"The code that wrote the checkpoint: {', '.join(PUBLISHED)}.")],
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="The checkpoint's file; for ppap one file per expert, the expert of the cleanest images first; or the "
            "folder of a model of this package with pickled weights."
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="The folder to write.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with settings that the weights do not show, such as the number of heads."),
    ] = None,
) -> None:
    """
    Convert a published checkpoint to safetensors. Pickles are read with `weights_only=True`: tensors, no code.

    diffusers-dmp convert dit DiT-XL-2-256x256.pt --output_dir dit-xl-2
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
    for path in checkpoints:
        if not path.exists():
            raise ValueError(f"Expected a checkpoint's file or folder, but got {str(path)!r}: there is none.")
    if checkpoints[0].is_dir():
        _convert_folder(system, checkpoints[0], output_dir)
    elif is_guidance:
        settings = {"base_model_folder": output_dir / "base_model"} | settings
        convert_file(system, checkpoints, settings).save_pretrained(output_dir)
    else:
        model = convert_file(system, checkpoints[0], settings)
        patch = patch_of(model)
        if patch is None:
            model.save_pretrained(output_dir)
        else:
            patch.detach().save_pretrained(output_dir / "patch")
            model.save_pretrained(output_dir / "transformer")
    typer.echo(f"Written to {output_dir}")


@app.command(cls=Command)
def publish(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A training's `output_dir`, or the folder of a pipeline, model, prompts, LoRA experts or guidance experts."
        ),
    ],
    repo_id: Annotated[str, typer.Argument(help="The repository: user/name.")],
    license: Annotated[str, typer.Option(help="Licence of the weights: apache-2.0, mit, cc-by-nc-4.0, …")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Replace everything in an existing repository, its card too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Show what would be uploaded.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model that it was made from.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set that it was trained on.")] = None,
) -> None:
    """
    Upload to the Hugging Face Hub: weights, code for users without this package, and a model card.

    diffusers-dmp publish outputs/demo user/dtr-digits --license apache-2.0 --dry_run
    """
    from .hub.publishing import publish

    if not folder.is_dir():
        raise ValueError(f"Expected `folder` to be an existing folder, but got {str(folder)!r}: there is none.")
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
    from .plots import specialisation_figures

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


@app.command(cls=Command)
def diagnose(
    pipeline: Folder,
    dataset: Annotated[
        str, typer.Option(help="Images to denoise: a folder, parquet files, or the Hub id of a data set.")
    ],
    output_dir: Annotated[Path, typer.Option(help="The folder for diagnosis.json and diagnosis.png.")] = Path("."),
    dataset_split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str, typer.Option(help="Column of images in the data set.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of class labels in the data set.")] = "label",
    image_fit: Annotated[
        str | None,
        typer.Option(help="How an image becomes a square: crop or pad. By default as in the training, or else crop."),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            help="Colour behind transparent pixels, and of padding: a name or #rrggbb. By default as in the training, or else "
            "white."
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip_unreadable", help="Leave out the images that cannot be read, and list them.")
    ] = False,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images to use.")] = 256,
    num_bands: Annotated[int, typer.Option(min=1, help="Number of bands that the timesteps are divided into.")] = 8,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, help="Number of denoising steps of the sampling that is counted.")
    ] = 50,
) -> None:
    """
    Measure what each expert is good at: its loss at every noise level, the loss if another takes its place, its use.

    diffusers-dmp diagnose outputs/patch_digits --dataset outputs/demo/digits
    """
    import json

    from diffusers.utils.torch_utils import get_device

    from .evaluation.diagnostics import diagnose, reading_of_training
    from .hub.folders import read_folder
    from .plots import diagnosis_figure
    from .saving.reading import read_json
    from .training.arguments import DataArguments
    from .training.data.images import load_checked

    check_source("--dataset", dataset, "file or folder", "dataset")
    reading: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    reading |= reading_of_training(read_folder(_local(pipeline)).training)
    chosen = {"image_fit": image_fit, "background": background}
    reading |= {name: value for name, value in chosen.items() if value is not None}
    images = load_checked(DataArguments(skip_unreadable=skip_unreadable, **reading), dataset, dataset_split)
    pipe = load_pipeline(pipeline).to(get_device())
    summary = Path(pipeline, "training_summary.json")
    training = read_json(summary) if summary.is_file() else None
    diagnosis = diagnose(
        pipe,
        images,
        num_images,
        num_bands,
        num_inference_steps,
        training,
        **reading,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    diagnosis_figure(diagnosis).savefig(output_dir / "diagnosis.png", dpi=120)
    (output_dir / "diagnosis.json").write_text(json.dumps(diagnosis.as_dict(), indent=2) + "\n", encoding="utf-8")
    for owner, row in enumerate(diagnosis.swap_losses):
        typer.echo(
            f"interval of expert {owner}: " + ", ".join(f"{loss:.4f} by {other}" for other, loss in enumerate(row))
        )
    typer.echo(f"{output_dir / 'diagnosis.json'}, {output_dir / 'diagnosis.png'}")


@app.command(cls=Command)
def info(
    folder: Annotated[str, typer.Argument(help="A folder, a LoRA file, or a Hub id such as user/name.")],
) -> None:
    """
    Describe a folder: system, intervals, training, evaluation; of a LoRA which noise it owns. Weights are neither loaded nor
    downloaded.

    diffusers-dmp info outputs/demo
    """
    from .hub.folders import read_folder
    from .hub.lora_info import described_loras

    path = _local(folder, "file or folder")
    summary = described_loras(path) or read_folder(path).summary()
    typer.echo(yaml.safe_dump(summary, sort_keys=False, allow_unicode=True, width=1000).rstrip())


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

    check_source("pipeline", name, repo_type="model")
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
    run_command(_run, name=NAME)


def _run(argv: list[str]) -> None:
    try:
        status = app(args=argv, prog_name=NAME, standalone_mode=False)
    except _UsageError as error:
        context: Any = getattr(error, "ctx", None)
        command = NAME if context is None else context.command_path
        message = error.format_message()
        message += "" if message.endswith((".", "?")) else "."
        raise ValueError(f"{message} `{command} --help` explains.") from error
    if status == INTERRUPTED:  # what Typer makes of it
        raise KeyboardInterrupt
    raise SystemExit(status or 0)


def _run_script(name: str, arguments: list[str]) -> None:
    """Run a training script; what comes before `--` are options of `accelerate launch`."""
    from .training.launching import launch

    end = arguments.index("--") if "--" in arguments else 0
    options, arguments = arguments[:end], [each for each in arguments[end:] if each != "--"]
    for option, value in zip(arguments, [*arguments[1:], None]):
        name_or_path = option.partition("=")[2] if option.startswith("--config=") else value
        if option.partition("=")[0] == "--config" and name_or_path is not None:
            find_preset(name_or_path)  # raises before anything is started
    if {"-h", "--help"} & set(arguments):  # without a launcher, which takes seconds
        raise SystemExit(subprocess.run([sys.executable, script_path(name), "--help"]).returncode)
    debug = [DEBUG] if DEBUG in sys.argv else []
    status = launch(script_path(name), [*arguments, *debug], options)
    if status:
        raise SystemExit(status)


def _with_underscores(option: str) -> str:
    """An option as it is spelled here, with underscores; any other argument as it is."""
    name, equals, value = option.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else option


def _class_indices(pipe: Any, names: list[str], indices: list[int]) -> list[int]:
    """
    The classes to sample: those named, which may be indices where no class has that name, and those given by index.

    Without any, the first classes of the model; none for a model without classes.

    Raises:
        ValueError: if there is no such class.
    """
    from .models.class_names import checked_class_names, find_class
    from .models.inputs import has_classes

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


def _local(name: str, kind: str = "folder") -> Path:
    """The folder or file itself, or a download of a repository's configurations and records."""
    from huggingface_hub import snapshot_download

    check_source("folder", name, kind, repo_type="model")
    patterns = ["*.json", "*.yaml"]
    return Path(name) if Path(name).exists() else Path(snapshot_download(name, allow_patterns=patterns))


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
