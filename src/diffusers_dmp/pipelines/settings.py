"""What a call of a pipeline asks for, as two small objects: once for the call, and once for each denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.modeling_utils import ModelMixin


@dataclass(kw_only=True)
class GenerationSettings:
    """The arguments of a pipeline's call that all denoisers share; see [`ClassConditionalPipeline.__call__`]."""

    class_labels: Any
    batch_size: int
    image: PipelineImageInput | None
    guidance_channels: int | None
    num_inference_steps: int
    timesteps: list[int] | None
    height: int | None
    width: int | None
    eta: float
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    output_type: str
    return_dict: bool
    callback_on_step_end: Callable | None
    callback_on_step_end_tensor_inputs: list[str]


@dataclass
class DenoiserSettings:
    """
    One of a pipeline's denoisers, and how it is used in a call.

    Args:
        denoiser ([`ModelMixin`]): The model.
        prediction_type (`str`): What it predicts: 'epsilon', 'sample' or 'v_prediction'.
        guidance_scale (`float` or list of B `float`): w of classifier-free guidance; 1 is none.
    """

    denoiser: ModelMixin
    prediction_type: str
    guidance_scale: Any
