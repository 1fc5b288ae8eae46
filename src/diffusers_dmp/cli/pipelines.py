"""Where a pipeline or another folder is that a command is given, and what is loaded of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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


def load_any_pipeline(source: str, dtype: str, device: str | None, scheduler: str | None) -> Any:
    """
    Load any pipeline of Diffusers or of this package.

    Args:
        source (`str`): Its folder or Hub id, from [`pipeline_source`].
        dtype (`str`): The precision that it computes in, such as 'bfloat16'.
        device (`str`, *optional*): By default an accelerator, if there is one.
        scheduler (`str`, *optional*): The class of another scheduler.

    Raises:
        ValueError: if there is no such device or it does not have the dtype, a file is damaged, or weights are not finite.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils.torch_utils import get_device

    from ..diffusion.schedulers import make_like
    from ..models.precision import check_device, check_dtype, dtype_named
    from ..saving.finite import expect_finite_pipeline
    from ..saving.weight_files import check_saved_folder

    chosen = check_device(device or get_device(), "--device")
    check_dtype(dtype_named(dtype, argument="--dtype"), chosen)
    check_saved_folder(source)
    pipe: Any = DiffusionPipeline.from_pretrained(source, dtype=dtype_named(dtype))
    expect_finite_pipeline(pipe, source)
    pipe.to(chosen)
    if scheduler is not None:
        pipe.scheduler = make_like(pipe.scheduler, scheduler)
    return pipe


def saved_pipeline_class(source: str) -> Any:
    """The class of a saved pipeline, which is not loaded; None if Diffusers has no such class."""
    from diffusers import DiffusionPipeline

    import diffusers_dmp  # noqa: F401  its pipelines are Diffusers' then

    from ..saving.pipeline_parts import saved_class

    return saved_class(DiffusionPipeline.load_config(source))


def saved_sample_size(source: str) -> Any:
    """The size of the images of a saved pipeline of pixels, without loading it; None if it has a VAE, or no size of its own."""
    from diffusers import DiffusionPipeline, UNet2DModel

    parts = DiffusionPipeline.load_config(source)
    denoiser = next((name for name in ("transformer", "unet") if name in parts), None)
    if denoiser is None or parts.get("vae", [None])[0] is not None:
        return None
    return UNet2DModel.load_config(source, subfolder=denoiser).get("sample_size")  # of any denoiser


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
