"""Which part of a shown pipeline is at work at a timestep, in figures and in a sentence."""

import io

from matplotlib.figure import Figure
from PIL import Image
from showcase import ShownPipeline

from diffusers_dmp import systems
from diffusers_dmp.pipelines.denoising import DenoisingMixin
from diffusers_dmp.plots import specialisation_figures

DPI = 110


def specialisation_picture(shown: ShownPipeline, timestep: int) -> Image.Image | None:
    """
    Plot how the parts of a pipeline divide the noise levels, the figures one below the other.

    Args:
        shown ([`ShownPipeline`]): The pipeline.
        timestep (`int`): The timestep to mark, in [0, T).

    Returns:
        `Image.Image`, or None for a pipeline without specialised parts.
    """
    figures = specialisation_figures(shown.pipeline, timestep)
    if shown.experts is not None:
        figures = specialisation_figures(_guided(shown), timestep) | figures
    pictures = [_picture(figure) for figure in figures.values()]
    if not pictures:
        return None
    width, height = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    page, top = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        page.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height
    return page


def responsibility(shown: ShownPipeline, timestep: int) -> str:
    """
    Say in one sentence which part is at work at a timestep.

    Args:
        shown ([`ShownPipeline`]): The pipeline.
        timestep (`int`): In [0, T).
    """
    return systems.responsibility(shown.pipeline if shown.experts is None else _guided(shown), timestep)


def _guided(shown: ShownPipeline) -> DenoisingMixin:
    """The pipeline as its experts guide it, to a class that makes no difference here."""
    return shown.guided(shown.pipeline, labels=[0])


def _picture(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return Image.open(file).convert("RGB")
