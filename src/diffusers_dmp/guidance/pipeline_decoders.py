"""Which decoder the latents of a pipeline need."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .decoders import LatentDecoder, PackedLatentDecoder, VideoDecoder

# By name, so that no pipeline is imported before it is used. A class that derives from one of these is found as well.
_IMAGES = """
    AuraFlowPipeline CogView3PlusPipeline CogView4ControlPipeline CogView4Pipeline DiTPipeline
    HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline HunyuanDiTPipeline KolorsImg2ImgPipeline KolorsPAGPipeline
    KolorsPipeline LatentConsistencyModelImg2ImgPipeline LatentConsistencyModelPipeline Lumina2Pipeline LuminaPipeline
    PixArtAlphaPipeline PixArtSigmaPAGPipeline PixArtSigmaPipeline SanaControlNetPipeline SanaPAGPipeline SanaPipeline
    StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline StableDiffusion3Img2ImgPipeline
    StableDiffusion3InpaintPipeline StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline
    StableDiffusion3Pipeline StableDiffusionControlNetImg2ImgPipeline StableDiffusionControlNetInpaintPipeline
    StableDiffusionControlNetPAGInpaintPipeline StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline
    StableDiffusionDepth2ImgPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
    StableDiffusionInstructPix2PixPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline
    StableDiffusionPAGPipeline StableDiffusionPipeline StableDiffusionXLControlNetImg2ImgPipeline
    StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
    StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPipeline
    StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
    StableDiffusionXLControlNetUnionPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
    StableDiffusionXLInstructPix2PixPipeline StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline
    StableDiffusionXLPAGPipeline StableDiffusionXLPipeline ZImageControlNetInpaintPipeline ZImageControlNetPipeline
    ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageOmniPipeline ZImagePipeline
"""
_PACKED = """
    ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline
    FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline FluxControlNetPipeline FluxControlPipeline
    FluxFillPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline FluxPipeline
    OvisImagePipeline QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline
    QwenImageEditPipeline QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImagePipeline
"""
_VIDEOS = """
    SkyReelsV2ImageToVideoPipeline SkyReelsV2Pipeline WanImageToVideoPipeline WanPipeline WanVideoToVideoPipeline
"""
_IMAGES_OR_PIXELS = "ClassConditionalPipeline SNRSplitPipeline SentenceToImagePipeline"  # of this package

_DECODERS: "dict[str | type, type[LatentDecoder] | Callable[[Any, torch.Tensor], torch.Tensor]]" = {
    **dict.fromkeys(_IMAGES.split() + _IMAGES_OR_PIXELS.split(), LatentDecoder),
    **dict.fromkeys(_PACKED.split(), PackedLatentDecoder),
    **dict.fromkeys(_VIDEOS.split(), VideoDecoder),
}


def register_decoder(
    pipeline_class: type, decoder: "type[LatentDecoder] | Callable[[Any, torch.Tensor], torch.Tensor]"
) -> None:
    """
    Teach guidance how the latents of a class of pipelines are decoded.

    ```py
    def decode(vae, latents):  # latents as `pipe.scheduler.step` gets them
        return vae.decode(latents / vae.config.scaling_factor).sample

    register_decoder(MyPipeline, decode)
    ```

    Args:
        pipeline_class (`type`): The class of pipelines; classes that derive from it are decoded in the same way.
        decoder (`Callable` or a class that derives from [`LatentDecoder`]): A function of the pipeline's VAE, or of a copy of it, and of
            latents (B, …) as the scheduler sees them, which returns images (B, 3, H, W) or videos (B, f, 3, H, W) in [-1, 1], and
            which gradients go through. Or a class, whose `from_pipeline` makes a decoder of a pipeline.

    Raises:
        ValueError: if `pipeline_class` is no class, or `decoder` cannot be called.
    """
    if not isinstance(pipeline_class, type):
        raise ValueError(f"Expected `pipeline_class` to be a class of pipelines, but got {pipeline_class!r}.")
    if not callable(decoder):
        raise ValueError(f"Expected `decoder` to be a function or a class, but got {decoder!r}.")
    _DECODERS[pipeline_class] = decoder


def decoder_of(pipeline: Any, **settings: Any) -> "LatentDecoder | None":
    """
    Return the decoder of a pipeline's latents.

    Args:
        pipeline ([`DiffusionPipeline`]): The pipeline, with the denoiser that it will be called with.
        settings: `vae`, another one than the pipeline's for the same latents; `frames` and `exact` for videos, see
            [`VideoDecoder`].

    Returns:
        [`LatentDecoder`], or None for a pipeline of pixels, one without a VAE.

    Raises:
        ValueError: if the pipeline has a VAE and nobody has registered how it is used, has been loaded without its VAE, or has no
            such settings.
    """
    name, autoencoders = type(pipeline).__name__, _autoencoders(pipeline)
    classes = [key for each in type(pipeline).__mro__ for key in (each, each.__name__)]
    decoder: Any = next((_DECODERS[key] for key in classes if key in _DECODERS), None)
    has_vae = bool(autoencoders) or settings.get("vae") is not None
    if not has_vae and (decoder is None or any(key in _IMAGES_OR_PIXELS.split() for key in classes)):
        if settings:
            raise ValueError(
                f"Expected no `{next(iter(settings))}` for a {name} without a VAE, which is guided by whole images."
            )
        return None
    if not has_vae:
        raise ValueError(
            f"Expected a {name} to have a VAE, or another one as `vae`, by which its latents are decoded, but got none."
        )
    if decoder is None:
        raise ValueError(
            f"Expected a pipeline whose latents are known to guidance, but got a {name} with {', '.join(autoencoders)}. "
            f"`register_decoder({name}, decode)` tells how they are decoded, where `decode(vae, latents)` returns images "
            "(B, 3, H, W) in [-1, 1]."
        )
    if isinstance(decoder, type) and issubclass(decoder, LatentDecoder):
        return decoder.from_pipeline(pipeline, **settings)
    return LatentDecoder.from_pipeline(pipeline, decode=decoder, **settings)


def _autoencoders(pipeline: Any) -> list[str]:
    """The names of the components that decode latents."""
    return [
        name
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module) and hasattr(component, "decode")
    ]
