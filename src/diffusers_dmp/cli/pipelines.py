"""Where a pipeline or another folder is that a command is given, and what is loaded of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..saving.sources import check_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Folder = Annotated[str, typer.Argument(help="A folder, a training's `output_dir`, or a Hub id such as user/name.")]


def load_pipeline(name: str) -> "DiffusionPipeline":
    """
    Load a [`ClassConditionalPipeline`] or [`SNRSplitPipeline`] from its folder, from a training's `output_dir`, or from the Hub.

    Raises:
        ValueError: if it is not a pipeline of this package.
    """
    from diffusers import DiffusionPipeline

    import diffusers_dmp

    from ..saving.finite import expect_finite_pipeline
    from ..saving.weight_files import check_saved_folder

    source = pipeline_source(name)
    check_saved_folder(source)
    pipeline = DiffusionPipeline.from_pretrained(source)
    if not isinstance(pipeline, (diffusers_dmp.ClassConditionalPipeline, diffusers_dmp.SNRSplitPipeline)):
        raise ValueError(
            f"Expected {name!r} to hold a ClassConditionalPipeline or SNRSplitPipeline, but got a {type(pipeline).__name__}."
        )
    expect_finite_pipeline(pipeline, source)
    return pipeline


def pipeline_source(name: str) -> str:
    """The folder of a pipeline, which may be in a training's `output_dir`, or a Hub id."""
    check_source("pipeline", name, repo_type="model")
    nested = Path(name, "pipeline")
    return str(nested) if nested.is_dir() else name


def local(name: str, kind: str = "folder") -> Path:
    """The folder or file itself, or a download of a repository's configurations and records."""
    from huggingface_hub import snapshot_download

    check_source("folder", name, kind, repo_type="model")
    patterns = ["*.json", "*.yaml"]
    return Path(name) if Path(name).exists() else Path(snapshot_download(name, allow_patterns=patterns))
