"""Commands that run the training scripts, and that make a pipeline of what they leave."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..systems import SYSTEMS
from ..terminal import DEBUG
from ..training.scripts import find_preset, script_path
from .program import Command, ScriptCommand, app

SCRIPTS = {system.key: system.training_script for system in SYSTEMS.values() if system.training_script is not None}
SCRIPTS["text_to_image"] = "train_text_to_image"
TRAINABLE = SCRIPTS | {SYSTEMS[key].short_name: script for key, script in SCRIPTS.items() if key in SYSTEMS}


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

    diffusers-dmp train text_to_image --config sd3_lora_experts --dataset outputs/encoded
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
    from ..training.export import export_checkpoint

    export_checkpoint(checkpoint, folder, use_ema=not no_ema)
    typer.echo(f"Written to {folder}")


def _run_script(name: str, arguments: list[str]) -> None:
    """Run a training script; what comes before `--` are options of `accelerate launch`."""
    from ..training.launching import launch

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
