"""What a denoiser is called with, and what a scheduler is handed of its answer.
Guidance: https://arxiv.org/abs/2207.12598, learned variance: https://arxiv.org/abs/2102.09672

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels, S denoising steps.
"""

from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.predictions import convert_prediction, expected_prediction_type, noise_levels
from ..diffusion.variance import as_learned_range
from ..plugins.attachment import patch_of
from ..saving.naming import descends_from


def classifier_free_guidance(
    model_output: torch.Tensor,
    guidance_scale: "float | torch.Tensor",
    sample_channels: int,
    guidance_channels: int | None = None,
) -> torch.Tensor:
    """
    Combine conditional and unconditional predictions (https://arxiv.org/abs/2207.12598, equation 6).

    Args:
        model_output (`torch.Tensor` of shape (2B, C or 2C, H, W)): The conditional half first.
        guidance_scale (`float`, or `torch.Tensor` of shape (B, 1, 1, 1)): w; 1 is the conditional prediction.
        sample_channels (`int`): C. The channels after them, a learned variance, stay the conditional ones.
        guidance_channels (`int`, *optional*): Guide the first of the C channels only. The published DiT, Remix-DiT and
            DMP guide 3 of 4; DTR all, as is the default here.

    Returns:
        `torch.Tensor` of shape (B, C or 2C, H, W).
    """
    conditional, unconditional = model_output.chunk(2)
    guided = sample_channels if guidance_channels is None else guidance_channels
    if not 1 <= guided <= sample_channels:
        raise ValueError(f"Expected `guidance_channels` to be in [1, {sample_channels}], but got {guidance_channels}.")
    # ε = ε(∅) + w·(ε(y) - ε(∅))
    prediction = unconditional[:, :guided] + guidance_scale * (conditional - unconditional)[:, :guided]
    return torch.cat([prediction.to(model_output.dtype), conditional[:, guided:]], dim=1)


def looks_at_inputs(denoiser: ModelMixin) -> bool:
    """
    Whether a denoiser reads its timesteps and labels on the host: a Remix-DiT does, and a patch that keeps its gates. They
    are left on the CPU for it, as an accelerator would have to be waited for at every step.
    """
    is_patched_dit = descends_from(denoiser, "DiTModel") and patch_of(denoiser) is not None
    return descends_from(denoiser, "RemixDiTModel") or is_patched_dit


@dataclass
class DenoiserInputs:
    """What one denoiser is called with, prepared once."""

    denoiser: ModelMixin
    own_type: str
    guidance: torch.Tensor | None  # (B or 1, 1, 1, 1)
    class_labels: torch.LongTensor | None  # (B,)
    timesteps: torch.Tensor  # (S,)
    device: torch.device
    num_classes: int | None

    def __post_init__(self):
        self.dtype = self.denoiser.dtype  # which Diffusers looks for anew each time
        device = "cpu" if looks_at_inputs(self.denoiser) else self.device
        self.timesteps = self.timesteps.to(device)
        self.label_kwargs = {}
        if self.class_labels is not None:
            labels = self.class_labels
            if self.guidance is not None:  # as many null classes behind them
                labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
            self.label_kwargs = {"class_labels": labels.to(device)}

    def predict(self, i: int, x_t: torch.Tensor, guidance_channels: int | None, keeps_variance: bool) -> torch.Tensor:
        """The prediction for step i, (B, C, H, W) → (B, C or 2C, H, W), in the dtype of x_t."""
        channels = x_t.shape[1]
        model_input = x_t.to(self.dtype)
        if self.guidance is not None:
            model_input = torch.cat([model_input, model_input])
        # expanded, not copied, so that the model sees that the batch shares its timestep
        timestep = self.timesteps[i].expand(len(model_input))
        output = self.denoiser(model_input, timestep, **self.label_kwargs).sample.to(x_t.dtype)
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
    """From what denoisers predict to what the scheduler is to be handed."""

    alphas: torch.Tensor  # (S,)
    sigmas: torch.Tensor  # (S,)
    target_type: str

    @classmethod
    def between(cls, own_types: list[str], scheduler: SchedulerMixin, device: torch.device) -> "Conversion | None":
        """
        None if there is nothing to convert.

        Raises:
            ValueError: if the scheduler is a flow-matching one, for which nothing is converted.
        """
        target_type = expected_prediction_type(scheduler)
        if all(own_type == target_type for own_type in own_types):
            return None
        alphas, sigmas = noise_levels(scheduler)
        return cls(alphas.to(device), sigmas.to(device), target_type)

    def __call__(self, i: int, model_output: torch.Tensor, x_t: torch.Tensor, own_type: str) -> torch.Tensor:
        """Of step i, (B, C or 2C, H, W): a variance stays what it is."""
        channels = x_t.shape[1]
        prediction = convert_prediction(
            model_output[:, :channels], x_t, self.alphas[i], self.sigmas[i], own_type, self.target_type
        )
        return torch.cat([prediction.to(model_output.dtype), model_output[:, channels:]], dim=1)
