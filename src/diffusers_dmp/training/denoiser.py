"""How the training loop calls the model that it trains.

Legend: B batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn


@dataclass(frozen=True)
class Denoiser:
    """
    Calls a denoiser as Diffusers' transformers are called: `model(x_t, timesteps, **conditions)`.

    A model with another signature has a subclass of its own.

    Args:
        sample_shape (`tuple[int, ...]`): The shape of one sample x_t, without the batch dimension.
    """

    sample_shape: tuple[int, ...]

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
