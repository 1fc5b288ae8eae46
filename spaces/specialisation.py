"""Who is responsible for a timestep, in pictures and in a sentence, whichever system it is."""

import io

import torch
from matplotlib.figure import Figure
from PIL import Image
from systems import System

from diffusers_dmp import DTRTransformer2DModel, NoiseIntervals, RemixDiTModel, SNRSplitPipeline
from diffusers_dmp.plots import experts_figure, specialisation_figures

DPI = 110


def specialisation_picture(system: System, timestep: int) -> Image.Image | None:
    """The plots below each other, with the timestep marked; none for a model of one part."""
    figures = list(specialisation_figures(system.pipeline, timestep).values())
    if system.experts is not None:
        figures.insert(0, experts_figure(system.experts, system.pipeline.scheduler, timestep))
    pictures = [_picture(figure) for figure in figures]
    if not pictures:
        return None
    width, height = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    page, top = Image.new("RGB", (width, height), "white"), 0
    for picture in pictures:
        page.paste(picture, ((width - picture.width) // 2, top))
        top += picture.height
    return page


def responsibility(system: System, timestep: int) -> str:
    """
    One sentence on who works at a timestep.

    Args:
        system ([`System`]): Loaded.
        timestep (`int`): In [0, T).
    """
    pipeline, model = system.pipeline, system.pipeline.denoisers[0]
    at, t = f"At timestep {timestep}", torch.tensor(timestep)
    if system.experts is not None:
        expert, stretch = _owner(system.experts.intervals, t)
        return f"{at} expert {expert} of {system.experts.config.num_experts} guides, whose timesteps are {stretch}."
    if isinstance(pipeline, SNRSplitPipeline):
        denoiser, stretch = _owner(pipeline.intervals(), t)
        alpha_cumprod = float(pipeline.scheduler.alphas_cumprod[timestep])
        snr = alpha_cumprod / max(1 - alpha_cumprod, 1e-12)
        return f"{at} the signal-to-noise ratio is {snr:.3g}: denoiser {denoiser} removes the noise, as at all of {stretch}."
    if pipeline.prompt_patch is not None and pipeline.prompt_patch.config.gate != "none":
        gates = pipeline.prompt_patch.gate_weights(t[None])[0]  # (L, M)
        block, prompt = divmod(int(gates.argmax()), gates.shape[1])
        share = float(gates.max()) * gates.shape[1]
        return f"{at} prompt {prompt} of {gates.shape[1]} counts most, in block {block}: {share:.2f} times an equal share."
    if isinstance(model, DTRTransformer2DModel):
        channels = model.task_routing.masks()[timestep].nonzero().flatten()
        width = model.task_routing.dim
        return (
            f"{at} each block works on {len(channels)} of {width} channels, from {channels.min()} to {channels.max()}."
        )
    if isinstance(model, RemixDiTModel):
        expert, stretch = _owner(model.intervals, t)
        shares = ", ".join(
            f"{share:.0%} of basis {basis}" for basis, share in enumerate(model.mixing_coefficients[expert].tolist())
        )
        return f"{at} expert {expert} denoises, whose timesteps are {stretch}: {shares}."
    return f"{at}, as at all others, the whole model works: it has no parts of their own."


def _owner(intervals: NoiseIntervals, timestep: torch.Tensor) -> tuple[int, str]:
    """Index and timesteps of who owns one."""
    owner = int(intervals.index(timestep))
    return owner, f"{intervals.edges[owner]:g} to {intervals.edges[owner + 1] - 1:g}"


def _picture(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI)
    return Image.open(file).convert("RGB")
