"""A mixture of normal distributions, one for each class, of which denoisers and noise-aware classifiers are known exactly.

x_t = α·x0 + σ·ε of class k is normal with the mean α·μ_k and the variance α²·s² + σ². Legend: B batch, K classes.
"""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.diffusion.noise import is_flow_matching
from diffusers_dmp.diffusion.predictions import noise_levels
from diffusers_dmp.diffusion.process import NoiseProcess

FLOW = {"process": "flow_matching"}
DDPM = {"beta_schedule": "linear"}


class GaussianMixture:
    """
    K classes of samples of any shape, all equally likely.

    Args:
        means (`torch.Tensor` of shape (K, …)): μ.
        std (`float`): s.
    """

    def __init__(self, means: torch.Tensor, std: float):
        self.means, self.std = means.double(), std

    @classmethod
    def random(cls, num_classes: int, shape: tuple[int, ...], std: float = 0.4, seed: int = 0) -> "GaussianMixture":
        return cls(torch.randn(num_classes, *shape, generator=torch.Generator().manual_seed(seed)), std)

    def sample(self, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """Clean samples (B, …) of the classes."""
        means = self.means[labels]
        return means + self.std * torch.randn(
            means.shape, generator=torch.Generator().manual_seed(seed), dtype=means.dtype
        )

    def class_log_probs(self, x_t: torch.Tensor, alpha: Any, sigma: Any) -> torch.Tensor:
        """log p(k | x_t) (B, K), differentiable."""
        variance = alpha**2 * self.std**2 + sigma**2
        distances = (x_t[:, None] - alpha * self.means.to(x_t.dtype)).flatten(2) ** 2
        return (-0.5 * distances.sum(-1) / variance).log_softmax(-1)

    def x0(self, x_t: torch.Tensor, alpha: Any, sigma: Any, label: int | None = None) -> torch.Tensor:
        """E[x0 | x_t] (B, …), of one class or of all."""
        weights = self.class_log_probs(x_t, alpha, sigma).exp()
        if label is not None:
            weights = torch.zeros_like(weights).index_fill(1, torch.tensor([label]), 1)
        mean = torch.einsum("bk,k...->b...", weights, self.means.to(x_t.dtype))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    def noise(self, x_t: torch.Tensor, alpha: Any, sigma: Any, label: int | None = None) -> torch.Tensor:
        """E[ε | x_t] (B, …)."""
        return (x_t - alpha * self.x0(x_t, alpha, sigma, label)) / sigma

    def velocity(self, x_t: torch.Tensor, sigma: Any, label: int | None = None) -> torch.Tensor:
        """E[ε - x0 | x_t] (B, …) of flow matching, x_t = (1-σ)·x0 + σ·ε."""
        return (x_t - self.x0(x_t, 1 - sigma, sigma, label)) / sigma

    def share_of(self, x0: torch.Tensor, label: int) -> float:
        """The share of samples (B, …) that are most likely of a class."""
        return (self.class_log_probs(x0, 1.0, 0.0).argmax(-1) == label).double().mean().item()


def generate(
    mixture: GaussianMixture, scheduler: SchedulerMixin, steps: int = 25, count: int = 4000, **schedule: Any
) -> torch.Tensor:
    """Samples (B, …) by a scheduler and the exact denoiser of the mixture, which knows of no class: always from the same noise."""
    scheduler.set_timesteps(steps, **schedule)
    shape, generator = (count, *mixture.means.shape[1:]), torch.Generator().manual_seed(0)
    x_t = torch.randn(shape, generator=generator, dtype=torch.float64) * getattr(scheduler, "init_noise_sigma", 1.0)
    own = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t, alpha, sigma in zip(scheduler.timesteps, *noise_levels(scheduler)):
        if is_flow_matching(scheduler):
            prediction = mixture.velocity(x_t, sigma)
            if scheduler.config.get("invert_sigmas"):
                prediction = -prediction  # as Mochi predicts it
        else:
            prediction = mixture.noise(scheduler.scale_model_input(x_t, t), alpha, sigma)
        x_t = scheduler.step(prediction, t, x_t, **own).prev_sample
    return x_t


class _Nothing(PreTrainedModel):
    """A network that is never called."""

    config_class = PreTrainedConfig

    def __init__(self, num_labels: int):
        super().__init__(PreTrainedConfig(num_labels=num_labels))
        self.unused = nn.Parameter(torch.zeros(1))


class MixtureExperts(GuidanceExperts):
    """
    Experts that know log p(k | x_t) exactly, at the noise level that their own process has at the timestep they are told.

    Args:
        mixture ([`GaussianMixture`]): The mixture.
        noise_schedule (`dict`): The noise that they were "trained" on.
        config: Other arguments of [`GuidanceExperts`].
    """

    def __init__(self, mixture: GaussianMixture, noise_schedule: dict[str, Any], **config: Any):
        plain = {"image_mean": [0.5], "image_std": [0.5], "method": "finetune", "num_experts": 1}
        super().__init__(_Nothing(len(mixture.means)), noise_schedule=noise_schedule, **plain | config)
        self.mixture = mixture
        self.seen: list[float] = []  # timesteps

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> ImageClassifierOutput:
        self.seen.append(timesteps.item())
        alpha, sigma = self._levels(timesteps.double())
        return ImageClassifierOutput(logits=self.mixture.class_log_probs(images, alpha, sigma))

    def _levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        process = self.process
        assert isinstance(process, NoiseProcess)
        if process.is_flow_matching:
            sigma = t / self.config.num_train_timesteps
            return 1 - sigma, sigma
        # between whole timesteps by the angle
        alphas_cumprod = process.scheduler.alphas_cumprod.double()
        angles = np.arctan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
        angle = torch.tensor(np.interp(t, np.arange(1000), angles))
        return angle.cos(), angle.sin()
