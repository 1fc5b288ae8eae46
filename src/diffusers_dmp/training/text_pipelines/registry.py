"""Which pipelines are of which family: those of Diffusers, and those that are registered."""

from typing import Any

from ...saving.naming import PACKAGE, full_name
from .base import TextPipeline
from .flux import FluxText
from .pixart import PixArtAlphaText, PixArtSigmaText
from .qwen_image import QwenImageText
from .sd3 import StableDiffusion3Text
from .sentence_to_image import SentenceToImageText
from .stable_diffusion import StableDiffusionText, StableDiffusionXLText
from .wan import WanText
from .z_image import ZImageText

# By the names of classes, which are not imported: that would take seconds.
_DIFFUSERS: dict[str, TextPipeline] = {
    "FluxPipeline": FluxText(),
    "PixArtAlphaPipeline": PixArtAlphaText(),
    "PixArtSigmaPipeline": PixArtSigmaText(),
    "QwenImagePipeline": QwenImageText(),
    "StableDiffusion3Pipeline": StableDiffusion3Text(),
    "StableDiffusionPipeline": StableDiffusionText(),
    "StableDiffusionXLPipeline": StableDiffusionXLText(),
    "WanPipeline": WanText(),
    "ZImagePipeline": ZImageText(),
}
_REGISTERED: dict[str, TextPipeline] = {f"{PACKAGE}.SentenceToImagePipeline": SentenceToImageText()}


def register_conditions(pipeline_class: type, text_pipeline: TextPipeline) -> None:
    """
    Teach how a class of pipelines encodes prompts and calls its denoiser.

    ```py
    register_conditions(MyPipeline, MyTextPipeline())
    ```

    Args:
        pipeline_class (`type`): The class. Its subclasses are of the same family unless they are registered themselves.
        text_pipeline ([`TextPipeline`]): How. It also replaces what is known about a class of Diffusers.

    Raises:
        ValueError: if it is not an instance of a [`TextPipeline`].
    """
    if not isinstance(pipeline_class, type):
        raise ValueError(f"Expected `pipeline_class` to be a class, but got a {type(pipeline_class).__name__}.")
    if not isinstance(text_pipeline, TextPipeline):
        kind = f"the class {text_pipeline.__name__}" if isinstance(text_pipeline, type) else repr(text_pipeline)
        raise ValueError(
            f"Expected `text_pipeline` to be an instance of a TextPipeline, such as MyTextPipeline(), but got {kind}."
        )
    _REGISTERED[full_name(pipeline_class)] = text_pipeline


def text_pipeline_of(pipeline_or_class: Any) -> TextPipeline:
    """
    Return how a pipeline encodes prompts and calls its denoiser.

    Args:
        pipeline_or_class ([`DiffusionPipeline`] or its class): A pipeline of a known family; see [`register_conditions`].

    Raises:
        ValueError: if its family is not known.
    """
    pipeline_class = pipeline_or_class if isinstance(pipeline_or_class, type) else type(pipeline_or_class)
    for cls in pipeline_class.__mro__:
        registered = _REGISTERED.get(full_name(cls))
        if registered is not None:
            return registered
        if cls.__module__.partition(".")[0] == "diffusers" and cls.__name__ in _DIFFUSERS:
            return _DIFFUSERS[cls.__name__]
    name = pipeline_class.__name__
    known = sorted({*_DIFFUSERS, *(key.rpartition(".")[2] for key in _REGISTERED)})
    raise ValueError(
        f"Expected a pipeline of a known family, {', '.join(known)}, but got a {name}; teach how its denoiser is called with "
        f"`register_conditions({name}, MyTextPipeline())`."
    )
