"""The guidance of one vision network: how it is set up, at which steps it applies, and its gradient.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233

Legend: B batch, f frames (videos only), H and W height and width; the other dimensions of a sample are its own.
"""

import contextlib
import copy
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..models.vision import ImagePreprocessor
from .decoders import LatentDecoder
from .experts import GuidanceExperts
from .step_schedule import NoisyStep
from .targets import GuidanceTarget

NONFINITE = ("raise", "unguided")


def check_setting(name: str, value: Any) -> None:
    """
    Check a setting of [`Guidance`].

    Args:
        name (`str`): The name of an argument of [`GuidedScheduler`]; of others than those that have a range, all values are right.
        value: What it is to be.

    Raises:
        ValueError: if it is out of range.
    """
    if name == "scale" and not isinstance(value, numbers.Real):
        raise ValueError(f"Expected `scale` to be a number, but got {value!r}.")
    if name == "timestep_range" and value is not None and not _is_timestep_range(value):
        raise ValueError(
            "Expected `timestep_range` to be two training timesteps, 0 <= low < high, where t = σ·T for flow matching, but got "
            f"{value!r}."
        )
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
    decoder: "Callable[[torch.Tensor], torch.Tensor] | None"
    on_nonfinite: str
    # timestep, that of the experts, and flag, on the samples' device, of each step since the last reset
    _nonfinite: "list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]" = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self):
        for name in ("scale", "timestep_range", "every", "on_nonfinite"):
            check_setting(name, getattr(self, name))
        self.set_experts(self.experts)

    def set_experts(self, experts: GuidanceExperts) -> None:
        """Guide by other experts, in whose network the target looks up its classes."""
        self.experts = experts.float().eval()
        self.set_target(self.target)

    def set_target(self, target: GuidanceTarget) -> None:
        """Ask for something else. The target is copied, as it looks up its classes in the network of these experts."""
        self.target = copy.deepcopy(target)
        self.target.prepare(self.experts.network_config)

    def applies(self, timestep: torch.Tensor, step: int, default_range: tuple[float, float]) -> bool:
        """
        Whether a step is to be guided.

        Args:
            timestep (`torch.Tensor` of shape ()): The training timestep with which the step begins, on the CPU.
            step (`int`): Number of the step, counted from the first one that is taken.
            default_range (`tuple[float, float]`): Which timesteps are guided where `timestep_range` is None.
        """
        low, high = self.timestep_range or default_range
        return low <= timestep.item() < high and step % self.every == 0

    def gradient(self, step: NoisyStep) -> torch.Tensor:
        """∇ log p(y | x_t) with respect to x_t (B, …), in float32 or float64."""
        device, dtype = step.x_t.device, step.x_t.dtype
        with torch.inference_mode(False), torch.enable_grad(), _without_autocast(device):
            if self.experts.device != device or self.experts.dtype != dtype:
                self.experts.to(device, dtype)
            # copies, as tensors that were made in inference mode take no part in gradients
            x_t = step.x_t.detach().clone().requires_grad_()
            log_likelihood = self._log_likelihood(step, x_t)
            self._check_shape(log_likelihood, len(x_t))
            gradient = None
            if log_likelihood.requires_grad:  # perhaps only because the experts' parameters do
                (gradient,) = torch.autograd.grad(log_likelihood.sum(), x_t, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"Expected the log-likelihood of a {type(self.target).__name__} to depend on the samples, but got one without a "
                "gradient; `torch.no_grad`, `detach` or rounding in a decoder, network or target cuts it off."
            )
        return gradient

    def _log_likelihood(self, step: NoisyStep, x_t: torch.Tensor) -> torch.Tensor:
        """log p(y | x_t) (B,)."""
        timestep, scale = step.as_trained(self.experts.process)
        if self.decoder is not None:
            images = self.decoder(step.x0_of(x_t)).to(x_t.dtype)
        else:
            images = x_t if scale is None else scale * x_t
            if images.ndim == 5:
                images = images.transpose(1, 2)  # frames before channels, as decoded ones
        self._check_images(images)
        if images.ndim == 4:
            return self.target.log_likelihood(self.experts(images, timestep))
        count = images.shape[1]
        output = self.experts(images.flatten(0, 1), timestep)
        return self.target.log_likelihood_of_frames([_frame(output, index, count) for index in range(count)])

    def _check_shape(self, log_likelihood: torch.Tensor, batch_size: int) -> None:
        """Refuse a target that has no number for each image."""
        if log_likelihood.shape != (batch_size,):
            raise ValueError(
                f"Expected the log-likelihood of a {type(self.target).__name__} to have the shape {(batch_size,)}, a number for "
                f"each image, but got {tuple(log_likelihood.shape)}."
            )

    def _check_images(self, images: torch.Tensor) -> None:
        """Refuse what the experts cannot see, and images of another size than they were trained on."""
        preprocess, channels = self.experts.preprocess, images.shape[-3] if images.ndim in (4, 5) else None
        known = len(preprocess.mean) if isinstance(preprocess, ImagePreprocessor) else 1
        if channels is None or (channels not in (1, known) and known > 1):
            raise ValueError(
                f"Expected the guidance experts to see images (B, C, H, W) or videos (B, f, C, H, W) of {known} channels, but got "
                f"the shape {tuple(images.shape)}. Latents need a `decoder`, which `GuidedScheduler.for_pipeline` finds."
            )
        trained, seen = self.experts.config.get("sample_size"), list(images.shape[-2:])
        if trained is not None and list(trained) != seen:
            raise ValueError(
                f"Expected images of {trained[0]} x {trained[1]} pixels, on which the guidance experts were trained, but got "
                f"{seen[0]} x {seen[1]}."
            )

    def finite_or(self, unguided: torch.Tensor, guided: torch.Tensor, step: NoisyStep) -> torch.Tensor:
        """
        Leave samples unguided whose guidance is not finite.

        With `on_nonfinite='raise'` it is remembered whether there are such samples, for [`raise_if_nonfinite`]; nothing is read
        back from an accelerator.

        Args:
            unguided, guided (`torch.Tensor` of shape (B, …)): The same tensor without and with guidance.
            step ([`NoisyStep`]): The step.
        """
        finite = guided.flatten(1).isfinite().all(1)
        if self.on_nonfinite == "raise":
            self._nonfinite.append((step.timestep, step.as_trained(self.experts.process)[0], (~finite).any()))
        return torch.where(per_sample(finite, guided), guided, unguided)

    def reset(self) -> None:
        """Forget the steps that were taken."""
        self._nonfinite = []
        if isinstance(self.decoder, LatentDecoder):
            self.decoder.reset()

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
        flags = torch.stack([flag for *_, flag in found]).tolist()
        for (timestep, as_trained, _), flag in zip(found, flags):
            if flag:
                expert = self.experts.intervals.index(as_trained.float()).item()  # in float32, as the experts find it
                raise FloatingPointError(
                    f"Expected guidance of scale {self.scale} to have finite gradients, but got others at timestep "
                    f"{timestep.item():g}, from expert {expert}. `on_nonfinite='unguided'` leaves such steps unguided."
                )


def per_sample(values: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Shape one value for each sample (B,) so that it is broadcast to samples (B, …)."""
    return values.view(-1, *[1] * (samples.ndim - 1))


def _is_timestep_range(value: Any) -> bool:
    """Whether a value is low and high of training timesteps; up to 1 they would be a σ or a share of the steps."""
    try:
        low, high = value
        return 0 <= low < high and high > 1
    except (TypeError, ValueError):
        return False


def _without_autocast(device: torch.device) -> Any:
    """A context without autocast, on devices that have it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _frame(output: ModelOutput, index: int, count: int) -> ModelOutput:
    """The output for one frame of each video, from that for all frames (B·f, …)."""
    frames = {
        name: value.unflatten(0, (-1, count))[:, index]
        for name, value in output.items()
        if isinstance(value, torch.Tensor)
    }
    return type(output)(**frames)
