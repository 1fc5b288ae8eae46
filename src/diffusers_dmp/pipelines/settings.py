"""What a call of a pipeline asks for, as two small objects: once for the call, and once for each denoiser."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.models.modeling_utils import ModelMixin

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(kw_only=True)
class GenerationSettings:
    """
    The arguments of a pipeline's call that all denoisers share; see [`ClassConditionalPipeline.__call__`].

    Raises:
        ValueError: if a number of images, steps or pixels is no integer from 1, the timesteps do not descend, or `generator` is no
            generator.
    """

    class_labels: Any
    batch_size: int | None
    num_images_per_label: int
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

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            self.batch_size = checked_count("batch_size", self.batch_size)
        self.num_images_per_label = checked_count("num_images_per_label", self.num_images_per_label)
        self.height = self.height if self.height is None else checked_count("height", self.height)
        self.width = self.width if self.width is None else checked_count("width", self.width)
        self.generator = list(self.generator) if isinstance(self.generator, tuple) else self.generator
        generators = self.generator if isinstance(self.generator, list) else [self.generator]
        if not all(each is None or isinstance(each, torch.Generator) for each in generators):
            raise ValueError(
                f"Expected `generator` to be a `torch.Generator` or a list of them, but got {self.generator!r}; "
                "`torch.Generator().manual_seed(5)` makes one."
            )
        self.num_inference_steps, self.timesteps = checked_steps(self.num_inference_steps, self.timesteps)


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


def check_outputs(settings: GenerationSettings, tensor_inputs: list[str]) -> None:
    """
    Check the kind of images and the tensors for the callback that a call asks for.

    Args:
        settings ([`GenerationSettings`]): The arguments of the call.
        tensor_inputs (`list[str]`): The tensors that the pipeline can give to a callback.

    Raises:
        ValueError: if one of them is unknown.
    """
    if settings.output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"Expected `output_type` to be 'pil', 'np', 'pt' or 'latent', but got {settings.output_type!r}."
        )
    unknown_inputs = set(settings.callback_on_step_end_tensor_inputs) - set(tensor_inputs)
    if unknown_inputs:
        raise ValueError(
            f"Expected `callback_on_step_end_tensor_inputs` to be among {tensor_inputs}, but got {sorted(unknown_inputs)}."
        )


def checked_count(name: str, value: Any) -> int:
    """
    Read a number of things.

    Args:
        name (`str`): The user's argument, for messages.
        value (`int`, or an integer of NumPy or PyTorch): The number.

    Raises:
        ValueError: if it is no integer, or less than 1.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, (bool, np.bool_)):
        raise ValueError(f"Expected `{name}` to be an integer of at least 1, but got {value!r}.")
    return count


def checked_steps(num_inference_steps: int, timesteps: Any = None) -> tuple[int, list[int] | None]:
    """
    Check how many steps, or which ones, a call is to make.

    Args:
        num_inference_steps (`int`): The number of steps, if `timesteps` is None.
        timesteps (`list[int]`, or an array or tensor of shape (S,), *optional*): Descending timesteps.

    Returns:
        The number, and the timesteps as a list, or None.

    Raises:
        ValueError: if the number is no integer from 1, or the timesteps are none, no numbers, or do not descend.
    """
    if timesteps is None:
        return checked_count("num_inference_steps", num_inference_steps), None
    values = np.asarray(timesteps.cpu() if isinstance(timesteps, torch.Tensor) else timesteps)
    is_descending = (
        values.ndim == 1 and len(values) > 0 and values.dtype.kind in "iuf" and (values[1:] < values[:-1]).all()
    )
    if not is_descending:
        raise ValueError(f"Expected `timesteps` to be one or more descending numbers, but got {timesteps}.")
    return len(values), values.tolist()
