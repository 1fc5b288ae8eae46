"""The guidance of one vision network: how it is set up, at which steps it applies, and its gradient.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL

from ..diffusion.latents import decode_latents
from ..diffusion.predictions import convert_prediction, to_x0
from .experts import GuidanceExperts
from .targets import GuidanceTarget

NONFINITE = ("raise", "unguided")


@dataclass(frozen=True)
class NoisyStep:
    """
    The input of one denoising step.

    Args:
        timestep (`torch.Tensor` of shape ()): The timestep, on the CPU.
        x_t (`torch.Tensor` of shape (B, C, H, W)): The noisy samples, α·x0 + σ·ε, in float32.
        prediction (`torch.Tensor` of shape (B, C, H, W)): The denoiser's prediction, in float32.
        prediction_type (`str`): The kind of the prediction; one of `PREDICTION_TYPES`.
        alpha, sigma (`torch.Tensor` of shape ()): α and σ, on the CPU.
    """

    timestep: torch.Tensor
    x_t: torch.Tensor
    prediction: torch.Tensor
    prediction_type: str
    alpha: torch.Tensor
    sigma: torch.Tensor

    def x0(self) -> torch.Tensor:
        """x̂0 (B, C, H, W) of the prediction."""
        return to_x0(self.prediction, self.x_t, self.alpha, self.sigma, self.prediction_type)

    def x0_of(self, x_t: torch.Tensor) -> torch.Tensor:
        """x̂0 (B, C, H, W) as a function of x_t, with a constant prediction; if that is x0, with constant noise."""
        prediction, kind = self.prediction.detach().clone(), self.prediction_type
        if kind == "sample":
            prediction = convert_prediction(prediction, x_t.detach(), self.alpha, self.sigma, kind, "epsilon")
            kind = "epsilon"
        return to_x0(prediction, x_t, self.alpha, self.sigma, kind)


def check_setting(name: str, value: Any) -> None:
    """
    Check a setting of [`Guidance`].

    Raises:
        ValueError: if it is out of range.
    """
    if name == "every" and value < 1:
        raise ValueError(f"Expected `every` to be at least 1, but got {value}.")
    if name == "on_nonfinite" and value not in NONFINITE:
        raise ValueError(f"Expected `on_nonfinite` to be one of {', '.join(NONFINITE)}, but got {value!r}.")


@dataclass(eq=False)
class Guidance:
    """
    What one vision network asks for, and how strongly. See [`GuidedScheduler`] for the arguments.

    Raises:
        ValueError: if an argument is out of range, or the target does not fit the experts' network.
    """

    experts: GuidanceExperts
    target: GuidanceTarget
    scale: float
    rescale_to_mean: bool
    timestep_range: "tuple[float, float] | None"
    every: int
    vae: AutoencoderKL | None
    on_nonfinite: str
    # timestep and flag, on the samples' device, of each step since the last reset
    _nonfinite: "list[tuple[torch.Tensor, torch.Tensor]]" = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        for name in ("every", "on_nonfinite"):
            check_setting(name, getattr(self, name))
        self.experts = self.experts.float().eval()
        self.set_target(self.target)
        if self.vae is not None and self.vae.dtype != torch.float32:
            self.vae = copy.deepcopy(self.vae).float()

    def set_target(self, target: GuidanceTarget) -> None:
        """Ask for something else. The target is copied, as it looks up its classes in the network of these experts."""
        self.target = copy.deepcopy(target)
        self.target.prepare(self.experts.network_config)

    def applies(self, timestep: torch.Tensor, step: int) -> bool:
        """
        Whether a step is to be guided.

        Args:
            timestep (`torch.Tensor` of shape ()): The timestep with which the step begins, on the CPU.
            step (`int`): Number of the step, counted from the first one that is taken.
        """
        low, high = self.timestep_range or (0, float("inf"))
        return low <= timestep.item() < high and step % self.every == 0

    def gradient(self, step: NoisyStep) -> torch.Tensor:
        """∇ log p(y | x_t) with respect to x_t (B, C, H, W), in float32."""
        device = step.x_t.device
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            if self.experts.device != device:
                self.experts.to(device)
            # copies, as tensors that were made in inference mode take no part in gradients
            x_t = step.x_t.detach().clone().requires_grad_()
            images = x_t if self.vae is None else decode_latents(self.vae, step.x0_of(x_t))
            log_likelihood = self.target.log_likelihood(self.experts(images, step.timestep))
            (gradient,) = torch.autograd.grad(log_likelihood.sum(), x_t)
        return gradient

    def finite_or(self, unguided: torch.Tensor, guided: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """
        Leave samples unguided whose guidance is not finite.

        With `on_nonfinite='raise'` it is remembered whether there are such samples, for [`raise_if_nonfinite`]; nothing is read
        back from an accelerator.

        Args:
            unguided, guided (`torch.Tensor` of shape (B, C, H, W)): The same tensor without and with guidance.
            timestep (`torch.Tensor` of shape ()): The timestep, on the CPU.
        """
        finite = guided.flatten(1).isfinite().all(1)
        if self.on_nonfinite == "raise":
            self._nonfinite.append((timestep, (~finite).any()))
        return torch.where(finite.view(-1, 1, 1, 1), guided, unguided)

    def reset(self) -> None:
        """Forget the steps that were taken."""
        self._nonfinite = []

    def raise_if_nonfinite(self) -> None:
        """
        Check all steps since the last [`reset`] at once, so that an accelerator is waited for only once.

        Raises:
            FloatingPointError: if guidance was not finite at one of them.
        """
        found = self._nonfinite
        self.reset()
        if not found:
            return
        flags = torch.stack([flag for _, flag in found]).tolist()
        for (timestep, _), flag in zip(found, flags):
            if flag:
                expert = self.experts.intervals.index(timestep).item()
                raise FloatingPointError(
                    f"Expected guidance of scale {self.scale} to have finite gradients, but got others at timestep "
                    f"{timestep.item():g}, from expert {expert}. `on_nonfinite='unguided'` leaves such steps unguided."
                )
