"""What a denoiser is called with, and what the scheduler gets of its output.

Guidance: https://arxiv.org/abs/2207.12598, learned variance: https://arxiv.org/abs/2102.09672.
Legend: B batch, C channels, H and W height and width, in pixels or latent pixels, S denoising steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.predictions import convert_prediction, expected_prediction_type, noise_levels
from ..diffusion.variance import as_learned_range
from ..models.inputs import class_count
from ..plugins.attachment import patch_of
from ..saving.naming import descends_from


def classifier_free_guidance(
    model_output: torch.Tensor,
    guidance_scale: float | torch.Tensor,
    sample_channels: int,
    guidance_channels: int | None = None,
) -> torch.Tensor:
    """
    Combine conditional and unconditional predictions (https://arxiv.org/abs/2207.12598, equation 6).

    Args:
        model_output (`torch.Tensor` of shape (2B, C or 2C, H, W)): The conditional half first.
        guidance_scale (`float`, or `torch.Tensor` of shape (B, 1, 1, 1)): w; 1 is the conditional prediction.
        sample_channels (`int`): C. The channels after them, a learned variance, stay the conditional ones.
        guidance_channels (`int`, *optional*): Guide only the first of the C channels. The published DiT, Remix-DiT and
            DMP guide 3 of 4; DTR guides all, as is the default here.

    Returns:
        `torch.Tensor` of shape (B, C or 2C, H, W).

    Raises:
        ValueError: if `guidance_channels` is not in [1, C].
    """
    conditional, unconditional = model_output.chunk(2)
    guided = sample_channels if guidance_channels is None else guidance_channels
    if not 1 <= guided <= sample_channels:
        raise ValueError(f"Expected `guidance_channels` to be in [1, {sample_channels}], but got {guidance_channels}.")
    # ε = ε(∅) + w·(ε(y) - ε(∅))
    prediction = unconditional[:, :guided] + guidance_scale * (conditional - unconditional)[:, :guided]
    return torch.cat([prediction.to(model_output.dtype), conditional[:, guided:]], dim=1)


def prepare_guidance(
    guidance_scale: Any, batch_size: int, has_null_class: bool, device: torch.device
) -> torch.Tensor | None:
    """
    Check the scale of classifier-free guidance.

    Args:
        guidance_scale (`float` or list of B `float`): w.
        batch_size (`int`): B.
        has_null_class (`bool`): Whether the model can predict without a class.
        device (`torch.device`): The device of the result.

    Returns:
        `torch.Tensor` of shape (B or 1, 1, 1, 1), in float32 for every dtype of the model; None if all scales are 1.

    Raises:
        ValueError: if there are neither one nor B scales, or the model has no null class.
    """
    try:
        scales = torch.as_tensor(guidance_scale, dtype=torch.float32, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `guidance_scale` to be a number or {batch_size} of them, but got {guidance_scale!r}."
        ) from error
    if len(scales) not in (1, batch_size):
        raise ValueError(f"Expected `guidance_scale` to be a number or {batch_size} of them, but got {len(scales)}.")
    if not scales.isfinite().all():
        raise ValueError(f"Expected `guidance_scale` to be finite, but got {guidance_scale}.")
    if (scales == 1).all():
        return None
    if not has_null_class:
        raise ValueError(
            f"Expected `guidance_scale` to be 1 for a model without a null class, but got {guidance_scale}."
        )
    return scales.to(device).view(-1, 1, 1, 1)


def reads_inputs_on_cpu(denoiser: ModelMixin) -> bool:
    """
    Tell whether a denoiser reads the values of its timesteps and labels on the CPU.

    A DTR, a Remix-DiT and a DiT with prompts do. They get these inputs on the CPU: to read them from an accelerator would make
    the CPU wait at every step.
    """
    is_prompted_dit = descends_from(denoiser, "DiTModel") and patch_of(denoiser) is not None
    chooses = any(descends_from(denoiser, name) for name in ("DTRTransformer2DModel", "RemixDiTModel"))
    return chooses or is_prompted_dit


@dataclass
class DenoiserInputs:
    """
    All inputs of one denoiser except x_t, moved to its device once.

    Args:
        denoiser ([`ModelMixin`]): The model.
        timesteps (`torch.Tensor` of shape (S,)): The timesteps of all steps.
        device (`torch.device`): The device of x_t.
        guidance (`torch.Tensor` of shape (B or 1, 1, 1, 1), *optional*): Scales of classifier-free guidance.
        class_labels (`torch.LongTensor` of shape (B,), *optional*): Class labels.
        low_res (`torch.Tensor` of shape (B, C', h, w), *optional*): Images to enlarge, in [-1, 1].
    """

    denoiser: ModelMixin
    timesteps: torch.Tensor
    device: torch.device
    guidance: torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    low_res: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = self.denoiser.dtype  # Diffusers would search for it at every step
        device = "cpu" if reads_inputs_on_cpu(self.denoiser) else self.device
        self.timesteps = self.timesteps.to(device)
        self.conditions: dict[str, torch.Tensor] = {}
        if self.class_labels is not None:
            null_class = class_count(self.denoiser.config) or 0  # its index is the number of classes
            unconditional = torch.full_like(self.class_labels, null_class)
            self.conditions["class_labels"] = self._doubled(self.class_labels, unconditional).to(device)
        if self.low_res is not None:  # guidance leaves out the class, not the image
            self.conditions["low_res"] = self._doubled(self.low_res, self.low_res).to(self.device)

    def _doubled(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """A batch (B, …), followed by its unconditional counterpart if there is guidance."""
        return conditional if self.guidance is None else torch.cat([conditional, unconditional])

    def predict(
        self, step: int, x_t: torch.Tensor, guidance_channels: int | None, keeps_variance: bool
    ) -> torch.Tensor:
        """
        Call the denoiser, and guide its prediction.

        Args:
            step (`int`): Index of the step.
            x_t (`torch.Tensor` of shape (B, C, H, W)): Noisy samples.
            guidance_channels (`int`, *optional*): See [`classifier_free_guidance`].
            keeps_variance (`bool`): Whether to return the variance channels as well.

        Returns:
            `torch.Tensor` of shape (B, C or 2C, H, W), in the dtype of `x_t`.
        """
        channels = x_t.shape[1]
        model_input = x_t.to(self.dtype)
        model_input = self._doubled(model_input, model_input)
        # expanded, not copied, so that the model sees that the batch shares its timestep
        timestep = self.timesteps[step].expand(len(model_input))
        output = self.denoiser(model_input, timestep, **self.conditions).sample.to(x_t.dtype)
        if self.guidance is not None:
            output = classifier_free_guidance(output, self.guidance, channels, guidance_channels)
        if not keeps_variance:
            return output[:, :channels]
        variance_type = getattr(self.denoiser, "variance_type", "learned_range")
        if variance_type != "learned_range":
            prediction, variance = output.split(channels, dim=1)
            output = torch.cat([prediction, as_learned_range(variance, variance_type)], dim=1)
        return output


@dataclass
class Conversion:
    """
    Converts what denoisers predict into what the scheduler expects.

    Args:
        alphas, sigmas (`torch.Tensor` of shape (S,)): α and σ of each step.
        target_type (`str`): The scheduler's prediction type.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    target_type: str

    @classmethod
    def between(
        cls, prediction_types: list[str], scheduler: SchedulerMixin, device: torch.device
    ) -> "Conversion | None":
        """
        Prepare the conversion for all steps.

        Args:
            prediction_types (`list[str]`): What each denoiser predicts.
            scheduler ([`SchedulerMixin`]): The scheduler, its timesteps set.
            device (`torch.device`): The device of the predictions.

        Returns:
            [`Conversion`], or None if every denoiser predicts what the scheduler expects.
        """
        target_type = expected_prediction_type(scheduler)
        if all(prediction_type == target_type for prediction_type in prediction_types):
            return None
        alphas, sigmas = noise_levels(scheduler)
        return cls(alphas.float().to(device), sigmas.float().to(device), target_type)

    def __call__(self, step: int, model_output: torch.Tensor, x_t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """
        Convert the prediction of one step; variance channels stay as they are.

        Args:
            step (`int`): Index of the step.
            model_output (`torch.Tensor` of shape (B, C or 2C, H, W)): A prediction of the kind `prediction_type`.
            x_t (`torch.Tensor` of shape (B, C, H, W)): The noisy samples that it was made for.
            prediction_type (`str`): What the denoiser predicts.
        """
        channels = x_t.shape[1]
        prediction = convert_prediction(
            model_output[:, :channels], x_t, self.alphas[step], self.sigmas[step], prediction_type, self.target_type
        )
        return torch.cat([prediction.to(model_output.dtype), model_output[:, channels:]], dim=1)
