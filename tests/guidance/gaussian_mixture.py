"""A mixture of normal distributions, one for each class, of which denoisers and noise-aware classifiers are known exactly.

x_t = α·x0 + σ·ε of class k is normal with the mean α·μ_k and the variance α²·s² + σ². Legend: B batch, K classes, D numbers of
a sample.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from diffusers_dmp import GuidanceExperts
from diffusers_dmp.diffusion.noise import levels_at
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

    def velocity(self, x_t: torch.Tensor, sigma: Any, label: int | None = None) -> torch.Tensor:
        """E[ε - x0 | x_t] (B, …) of flow matching, x_t = (1-σ)·x0 + σ·ε."""
        return (x_t - self.x0(x_t, 1 - sigma, sigma, label)) / sigma

    def share_of(self, x0: torch.Tensor, label: int) -> float:
        """The share of samples (B, …) that are most likely of a class."""
        return (self.class_log_probs(x0, 1.0, 0.0).argmax(-1) == label).double().mean().item()


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
            return 1 - t / 1000, t / 1000
        # between whole timesteps by the angle, independently of the code under test: a fine bisection would do the same
        low, part = t.floor(), t - t.floor()
        ends = [
            torch.atan2(*reversed(levels_at(process.scheduler, (low + step).clamp(max=999)))).double()
            for step in (0, 1)
        ]
        angle = ends[0] + part * (ends[1] - ends[0])
        return angle.cos(), angle.sin()
