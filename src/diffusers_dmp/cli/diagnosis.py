"""The command that measures what each expert is good at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..saving.sources import check_source
from .pipelines import Folder, load_pipeline, local, pipeline_source
from .program import Command, app

if TYPE_CHECKING:
    from ..evaluation.diagnostics import Diagnosis


@app.command(cls=Command)
def diagnose(
    pipeline: Folder,
    dataset: Annotated[
        str,
        typer.Option(
            help="Images to denoise: a folder, parquet files, or the Hub id of a data set. For a text pipeline, what "
            "encode_prompts.py wrote."
        ),
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
    lora_experts: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of LoRA experts for a text pipeline, which is measured without them, too."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of a text pipeline's denoiser: float32, float16 or bfloat16.")
    ] = "float32",
) -> None:
    """
    Measure what each expert is good at: its loss at every noise level, the loss if another takes its place, its use.

    diffusers-dmp diagnose outputs/patch_digits --dataset outputs/demo/digits

    diffusers-dmp diagnose stable-diffusion-3.5-medium --dataset outputs/encoded --lora_experts outputs/sd3_lora_experts
    """
    import json

    from ..evaluation.text_diagnostics import diagnose_encoded, is_text_pipeline
    from ..plots import diagnosis_figure
    from ..training.data.encoded_text import load_encoded

    check_source("--dataset", dataset, "file or folder", "dataset")
    counts = num_images, num_bands, num_inference_steps
    if is_text_pipeline(source := pipeline_source(pipeline)):
        diagnosis = diagnose_encoded(source, load_encoded(dataset, dataset_split), lora_experts, *counts, dtype=dtype)
    elif lora_experts is not None:
        raise ValueError(
            f"Expected `--lora_experts` for a text pipeline only, but got {lora_experts!r} for {pipeline!r}."
        )
    else:
        reading: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
        chosen = {"image_fit": image_fit, "background": background}
        reading |= {name: value for name, value in chosen.items() if value is not None}
        diagnosis = _diagnose_images(pipeline, dataset, dataset_split, skip_unreadable, reading, counts)
    output_dir.mkdir(parents=True, exist_ok=True)
    diagnosis_figure(diagnosis).savefig(output_dir / "diagnosis.png", dpi=120)
    (output_dir / "diagnosis.json").write_text(json.dumps(diagnosis.as_dict(), indent=2) + "\n", encoding="utf-8")
    for owner, row in enumerate(diagnosis.swap_losses):
        losses = [f"{loss:.4f} by {other}" for other, loss in enumerate(row)]
        if diagnosis.base_losses is not None:
            losses.append(f"{diagnosis.base_losses[owner]:.4f} without LoRA")
        typer.echo(f"interval of expert {owner}: {', '.join(losses)}")
    typer.echo(f"{output_dir / 'diagnosis.json'}, {output_dir / 'diagnosis.png'}")


def _diagnose_images(
    name: str, dataset: str, split: str, skip_unreadable: bool, chosen: dict[str, str], counts: tuple[int, int, int]
) -> "Diagnosis":
    """Diagnose a pipeline of this package on images, which are read as in its training where nothing else is chosen."""
    from diffusers.utils.torch_utils import get_device

    from ..evaluation.diagnostics import diagnose, reading_of_training
    from ..hub.folders import read_folder
    from ..saving.reading import read_json
    from ..training.arguments import DataArguments
    from ..training.data.images import load_checked

    reading: dict[str, Any] = reading_of_training(read_folder(local(name)).training) | chosen
    images = load_checked(DataArguments(skip_unreadable=skip_unreadable, **reading), dataset, split)
    pipeline: Any = load_pipeline(name).to(get_device())
    summary = Path(name, "training_summary.json")
    training = read_json(summary) if summary.is_file() else None
    return diagnose(pipeline, images, *counts, training, **reading)
