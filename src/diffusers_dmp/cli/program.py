"""The program `diffusers-dmp` itself: how its commands are spelled, and how they end."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..saving.version import __version__
from ..terminal import DEBUG, DEBUG_HELP, INTERRUPTED, run_command, with_new_names

NAME = "diffusers-dmp"
HELP = (
    "Train, sample and guide images, convert published weights, export checkpoints, publish, plot, diagnose, describe."
)
RENAMED = {  # options, by their names up to 0.2
    "sample": {"per_class": "num_images_per_label", "steps": "num_inference_steps"},
    "convert": {"output": "output_dir"},
    "plot": {"output": "output_dir", "steps": "num_inference_steps"},
    "diagnose": {
        "output": "output_dir", "split": "dataset_split", "images": "num_images", "bands": "num_bands",
        "steps": "num_inference_steps",
    },
}  # fmt: skip
SHORT = {"guide": {"out": "output"}}  # options, by what else they may be called
_UsageError: Any = typer.BadParameter.__mro__[1]  # click's, of which Typer may have a copy


class Command(TyperCommand):
    """A command whose options are spelled as those of the training scripts: with underscores; hyphens are understood."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            parameter.opts = [_with_underscores(option) for option in parameter.opts]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command.parse_args`."""
        name = self.name or ""
        args = [_in_full(_with_underscores(argument), SHORT.get(name, {})) for argument in args]
        args = with_new_names(args, RENAMED.get(name, {}))
        return super().parse_args(ctx, args)


class ScriptCommand(TyperCommand):
    """A command whose whole command line, `--help` too, is that of a script."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click's `Command.parse_args`."""
        return super().parse_args(ctx, ["--", *args])


# Each command imports what else it needs itself, so that `--help`, and a typing error, are answered at once.
app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True, help=HELP)
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


def _with_underscores(option: str) -> str:
    """An option as it is spelled here, with underscores; any other argument as it is."""
    name, equals, value = option.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else option


def _in_full(option: str, names: dict[str, str]) -> str:
    """An option by its whole name; any other argument as it is."""
    name, equals, value = option.partition("=")
    return f"--{names[name[2:]]}{equals}{value}" if name.startswith("--") and name[2:] in names else option
