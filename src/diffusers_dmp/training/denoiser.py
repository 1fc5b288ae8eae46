"""How the training loop calls the model that it trains.

Legend: B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

from ..models.time_argument import time_argument_of


class Denoiser:
    """
    Calls a denoiser as Diffusers' transformers are called: `model(x_t, timesteps, **conditions)`.

    A model with another signature has a subclass of its own.

    Args:
        sample_shape (`tuple[int, ...]`): The shape of one sample x_t, without the batch dimension.
    """

    def __init__(self, sample_shape: tuple[int, ...] = ()):
        self.sample_shape = sample_shape

    def shape_of(self, batch: dict[str, torch.Tensor]) -> tuple[int, ...]:
        """The shape of one sample x_t of a batch, without the batch dimension."""
        return self.sample_shape

    def __call__(
        self,
        model: nn.Module,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
        expert: int | None = None,
    ) -> BaseOutput:
        """
        What the model makes of a noisy batch.

        Args:
            model (`nn.Module`): The model, as `accelerator.prepare` returned it.
            x_t (`torch.Tensor` of shape (B, *sample_shape)): The noisy samples.
            timesteps (`torch.Tensor` of shape (B,)): In steps of the training schedule.
            conditions (`dict[str, Any]`): Keyword arguments; see [`Conditions`].
            expert (`int`, *optional*): The expert that owns all timesteps, for a model that takes it as an argument.

        Returns:
            The model's output, with the prediction in `sample`, and with the auxiliary losses, if it has any.
        """
        arguments = conditions if expert is None else conditions | {"expert": expert}
        return model(x_t, timesteps, **arguments)


@dataclass
class Prediction(BaseOutput):
    """
    What a denoiser predicts.

    Args:
        sample (`torch.Tensor` of shape (B, …)): The prediction, of the shape of x_t.
    """

    sample: torch.Tensor


class TextDenoiser(Denoiser):
    """
    Calls the denoiser of a text-to-image pipeline as that pipeline does.

    The latents in a batch decide the shape of its samples.

    Args:
        call (`Callable`): [`TextPipeline.call`] of the pipeline's family.
        denoiser (`nn.Module`): The denoiser, of which class and configuration are read.
        num_train_timesteps (`int`): T.
    """

    def __init__(self, call: Callable[..., torch.Tensor], denoiser: nn.Module, num_train_timesteps: int):
        super().__init__()
        self.call = call
        self.config = denoiser.config
        self.time_argument = time_argument_of(denoiser)
        self.num_train_timesteps = num_train_timesteps

    def shape_of(self, batch: dict[str, torch.Tensor]) -> tuple[int, ...]:
        """The shape of one sample x_t, (C, …), of the latents (B, 1 or 2, C, …) in a batch."""
        return tuple(batch["mean"].shape[2:])

    def __call__(
        self,
        model: nn.Module,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: dict[str, Any],
        expert: int | None = None,
    ) -> Prediction:
        """See [`Denoiser`]; the denoiser finds the expert by the time that it is told."""
        time = self.time_argument.told(timesteps, self.num_train_timesteps).to(x_t.device)
        return Prediction(sample=self.call(model, self.config, x_t, time, conditions))
