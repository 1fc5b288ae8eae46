"""Commands about folders: published weights to convert, what is published, what a folder holds."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from ..systems import SYSTEMS
from .pipelines import local
from .program import Command, app

# whose original checkpoints can be converted
PUBLISHED = (*(key for key, system in SYSTEMS.items() if system.training_script is not None), "adm")


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
    from ..conversion.original import convert_file
    from ..plugins.attachment import patch_of
    from ..saving.reading import read_yaml

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
    from ..hub.publishing import publish

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
def info(
    folder: Annotated[str, typer.Argument(help="A folder, a LoRA file, or a Hub id such as user/name.")],
) -> None:
    """
    Describe a folder: system, intervals, training, evaluation; of a LoRA which noise it owns. Weights are neither loaded nor
    downloaded.

    diffusers-dmp info outputs/demo
    """
    from ..hub.folders import read_folder
    from ..hub.lora_info import described_loras

    path = local(folder, "file or folder")
    summary = described_loras(path) or read_folder(path).summary()
    typer.echo(yaml.safe_dump(summary, sort_keys=False, allow_unicode=True, width=1000).rstrip())


def _convert_folder(system: str, folder: Path, output: Path) -> None:
    """Convert a model's folder with pickled weights into one with safetensors."""
    import diffusers_dmp

    from ..conversion import load_original_state_dict
    from ..hub.folders import read_folder
    from ..saving.finite import expect_finite_weights
    from ..saving.weight_files import saved_files

    contents = read_folder(folder)
    if contents.system != system or contents.is_pipeline or SYSTEMS[system].is_guidance:
        hint = "; convert its components one by one" if contents.is_pipeline else ""
        raise ValueError(f"Expected the folder of a model of {system}, but got that of a {contents.class_name}{hint}.")
    for file in saved_files(contents.path, "*.bin", components=False):  # Diffusers does not say what is wrong with one
        expect_finite_weights(load_original_state_dict(file), file)
    model_class = getattr(diffusers_dmp, contents.class_name)
    model_class.from_pretrained(contents.path, use_safetensors=False).save_pretrained(output)
