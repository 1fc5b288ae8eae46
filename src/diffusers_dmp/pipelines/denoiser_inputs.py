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
from ..models.inputs import class_count, has_classes, to_device
from ..plugins.attachment import patch_of
from ..saving.naming import descends_from
from .step_modulations import StepModulations


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
    guided = sample_channels if guidance_channels is None else guidance_channels
    if not 1 <= guided <= sample_channels:
        raise ValueError(f"Expected `guidance_channels` to be in [1, {sample_channels}], but got {guidance_channels}.")
    outputs, weight = model_output[:, :guided], guidance_scale
    if isinstance(weight, torch.Tensor):  # PyTorch computes in float32 at least where it is a number
        outputs = outputs.to(torch.promote_types(outputs.dtype, weight.dtype))
        weight = weight.to(outputs.dtype)
    conditional, unconditional = outputs.chunk(2)
    # ε = ε(∅) + w·(ε(y) - ε(∅))
    prediction = torch.lerp(unconditional, conditional, weight).to(model_output.dtype)  # type: ignore[arg-type]
    if guided == model_output.shape[1]:
        return prediction
    return torch.cat([prediction, model_output.chunk(2)[0][:, guided:]], dim=1)


def prepare_guidance(
    guidance_scale: Any, batch_size: int, has_null_class: bool, device: torch.device
) -> float | torch.Tensor | None:
    """
    Check the scale of classifier-free guidance.

    Args:
        guidance_scale (`float` or list of B `float`): w.
        batch_size (`int`): B.
        has_null_class (`bool`): Whether the model can predict without a class.
        device (`torch.device`): The device of the result.

    Returns:
        `float`, or `torch.Tensor` of shape (B, 1, 1, 1) in float32 for every dtype of the model; None if all scales are 1.

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
    # a number takes part in an operation, where a tensor would first be converted
    return scales.item() if len(scales) == 1 else to_device(scales, device).view(-1, 1, 1, 1)


def reads_inputs_on_cpu(denoiser: ModelMixin) -> bool:
    """
    Tell whether a denoiser reads the values of its timesteps on the CPU.

    A DTR, a Remix-DiT and a DiT with prompts do. They get the timesteps on the CPU: to read them from an accelerator would make
    the CPU wait at every step.
    """
    chooses = any(descends_from(denoiser, name) for name in ("DTRTransformer2DModel", "RemixDiTModel"))
    return chooses or _has_prompts(denoiser)


def _has_prompts(denoiser: ModelMixin) -> bool:
    """Whether it is a DiT with prompts, which finds cached gates by the values of timesteps and labels."""
    return descends_from(denoiser, "DiTModel") and patch_of(denoiser) is not None


@dataclass
class DenoiserInputs:
    """
    All inputs of one denoiser except x_t, moved to its device once.

    Args:
        denoiser ([`ModelMixin`]): The model.
        timesteps (`torch.Tensor` of shape (S,)): The timesteps of all steps, on the CPU.
        device (`torch.device`): The device of x_t.
        steps (`list[int]`): Indices of the steps that the denoiser makes.
        guidance (`float`, or `torch.Tensor` of shape (B, 1, 1, 1), *optional*): Scales of classifier-free guidance.
        class_labels (`torch.LongTensor` of shape (B,), *optional*): Class labels, on the CPU.
        low_res (`torch.Tensor` of shape (B, C', h, w), *optional*): Images to enlarge, in [-1, 1].
    """

    denoiser: ModelMixin
    timesteps: torch.Tensor
    device: torch.device
    steps: list[int]
    guidance: float | torch.Tensor | None = None
    class_labels: torch.Tensor | None = None
    low_res: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = self.denoiser.dtype  # Diffusers would search for it at every step
        self.conditions: dict[str, torch.Tensor] = {}
        self.modulations: StepModulations | None = None
        if self.class_labels is not None:
            num_classes = class_count(self.denoiser.config)
            # the index of the null class is the number of classes
            unconditional = torch.full_like(self.class_labels, num_classes or 0)
            labels = self._doubled(self.class_labels, unconditional)
            self.conditions["class_labels"] = labels if _has_prompts(self.denoiser) else to_device(labels, self.device)
            # only where there is one class, so that whether labels are equal does not decide the shape of what is compiled
            is_shared = not has_classes(num_classes) and bool((labels == labels[0]).all())
            known = labels[:1] if is_shared else labels
            self.modulations = StepModulations(self.denoiser, self.timesteps, known, self.device, self.steps)
        if self.low_res is not None:  # guidance leaves out the class, not the image
            self.conditions["low_res"] = to_device(self._doubled(self.low_res, self.low_res), self.device)
        if not reads_inputs_on_cpu(self.denoiser):
            self.timesteps = to_device(self.timesteps, self.device)

    def _doubled(self, conditional: torch.Tensor, unconditional: torch.Tensor) -> torch.Tensor:
        """A batch (B, …), followed by its unconditional counterpart if there is guidance."""
        return conditional if self.guidance is None else torch.cat([conditional, unconditional])

    def notice_changes(self) -> None:
        """Notice that a callback changed the model between two steps."""
        if self.modulations is not None:
            self.modulations.notice_changes()

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
        conditions: dict[str, Any] = self.conditions
        modulations = None if self.modulations is None else self.modulations.at(step)
        if modulations is not None:
            conditions = conditions | {"modulations": modulations}
        output = self.denoiser(model_input, timestep, **conditions).sample.to(x_t.dtype)
        if not keeps_variance:
            output = output[:, :channels]
        if self.guidance is not None:
            output = classifier_free_guidance(output, self.guidance, channels, guidance_channels)
        if not keeps_variance:
            return output
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
        alphas, sigmas (`torch.Tensor` of shape (S,)): α and σ of each step, on the CPU.
        target_type (`str`): The scheduler's prediction type.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    target_type: str

    @classmethod
    def between(cls, prediction_types: list[str], scheduler: SchedulerMixin) -> "Conversion | None":
        """
        Prepare the conversion for all steps.

        Args:
            prediction_types (`list[str]`): What each denoiser predicts.
            scheduler ([`SchedulerMixin`]): The scheduler, its timesteps set.

        Returns:
            [`Conversion`], or None if every denoiser predicts what the scheduler expects.
        """
        target_type = expected_prediction_type(scheduler)
        if all(prediction_type == target_type for prediction_type in prediction_types):
            return None
        alphas, sigmas = noise_levels(scheduler)
        return cls(alphas.float(), sigmas.float(), target_type)

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
        prediction = prediction.to(model_output.dtype)
        if model_output.shape[1] == channels:
            return prediction
        return torch.cat([prediction, model_output[:, channels:]], dim=1)
