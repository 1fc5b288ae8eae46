"""The training loss: what Diffusers' schedulers, which carry the diffusion process, lack.
DDPM: https://arxiv.org/abs/2006.11239, learned variance: https://arxiv.org/abs/2102.09672 (iDDPM)

Legend: B batch, C channels, H and W height and width, T training timesteps.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import nn

from ...diffusion.noise import noisy_sample
from ...diffusion.predictions import PREDICTION_TYPES, posterior_weights, to_x0, velocity
from ...diffusion.variance import VARIANCE_TYPES
from ...intervals import NoiseIntervals
from .weighting import UncertaintyWeighting, loss_weights

NUM_UNCERTAINTY_CLUSTERS = 8  # DTR, section 5.1


@dataclass
class DiffusionObjectiveOutput(BaseOutput):
    """
    Args:
        loss (`torch.Tensor` of shape ()): To call `backward` on.
        sample_losses (`torch.Tensor` of shape (B,)): Weighted squared error plus variational bound, per sample.
        mse (`torch.Tensor` of shape (B,)): The weighted mean squared error.
        vb (`torch.Tensor` of shape (B,), *optional*): The variational bound, in bits per dimension.
    """

    loss: torch.Tensor
    sample_losses: torch.Tensor | None = None
    mse: torch.Tensor | None = None
    vb: torch.Tensor | None = None


class DiffusionObjective(nn.Module):
    """
    Weighted squared error of what the model predicts, plus, for a learned variance, the variational bound.

    Args:
        scheduler: A Diffusers scheduler with `betas`; its `prediction_type` ('epsilon', 'sample' or 'v_prediction') is
            the model's.
        weighting (`str`): See [`loss_weights`]. With 'uw' the module has parameters, which want their own optimiser group.
        variance_type (`str`, *optional*): 'learned_range' or 'learned_range_sigmoid' for a model of 2C output channels.

    Raises:
        ValueError: if the weighting, the prediction type or the variance type is unknown.
    """

    columns: tuple[str, ...] = ()  # of the batch that it looks at beside the images

    def __init__(self, scheduler, weighting: str = "constant", variance_type: str | None = None):
        super().__init__()
        self.prediction_type = scheduler.config.prediction_type
        self.variance_type = variance_type
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"Expected the scheduler's `prediction_type` to be one of {', '.join(PREDICTION_TYPES)}, "
                f"but got {self.prediction_type!r}."
            )
        if variance_type is not None and variance_type not in VARIANCE_TYPES:
            raise ValueError(
                f"Expected `variance_type` to be one of {', '.join(VARIANCE_TYPES)}, but got {variance_type!r}."
            )
        betas = scheduler.betas.double().cpu()
        alphas_cumprod = (1 - betas).cumprod(0)
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])

        # β̃_t = β_t·(1 - ᾱ_{t-1}) / (1 - ᾱ_t), which is 0 at t = 0: there its logarithm takes the value of t = 1
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        posterior_variance[0] = posterior_variance[1]
        posterior_x0, posterior_xt = posterior_weights(alphas_cumprod, alphas_cumprod_prev)
        tables = {
            "weights": loss_weights(weighting, alphas_cumprod, self.prediction_type),
            "alpha": alphas_cumprod.sqrt(),
            "sigma": (1 - alphas_cumprod).sqrt(),
            "log_beta": betas.log(),
            "log_posterior_variance": posterior_variance.log(),
            "posterior_x0": posterior_x0,
            "posterior_xt": posterior_xt,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)  # (T,)

        clusters = NoiseIntervals.uniform(NUM_UNCERTAINTY_CLUSTERS, len(betas)) if weighting == "uw" else None
        self.uncertainty = UncertaintyWeighting(clusters) if clusters else None
        # the intervals over which a batch has to be balanced
        self.train_intervals = clusters or NoiseIntervals.uniform(1, len(betas))

    def forward(
        self, model_output: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor
    ) -> DiffusionObjectiveOutput:
        """
        Args:
            model_output (`torch.Tensor` of shape (B, C or 2C, H, W)): For x_t = √ᾱ·x0 + √(1-ᾱ)·ε.
            x0 (`torch.Tensor` of shape (B, C, H, W)), noise (`torch.Tensor` of shape (B, C, H, W)): What x_t came from.
            timesteps (`torch.LongTensor` of shape (B,)).

        Raises:
            ValueError: if the model's channels are not those that `variance_type` wants.
        """
        expected_channels = x0.shape[1] * (1 if self.variance_type is None else 2)
        if model_output.shape[1] != expected_channels:
            raise ValueError(
                f"Expected `model_output` to have {expected_channels} channels, for data of {x0.shape[1]} and "
                f"`variance_type` {self.variance_type!r}, but got {model_output.shape[1]}."
            )
        model_output = model_output.float()  # the bound's logarithms and differences need the precision
        prediction, variance_output = model_output[:, : x0.shape[1]], model_output[:, x0.shape[1] :]

        error = (self._target(x0, noise, timesteps) - prediction) ** 2
        mse = self.weights[timesteps] * error.flatten(1).mean(1)  # (B,)
        vb = None
        sample_losses = mse
        if self.variance_type is not None:
            # the bound trains the variance alone: the mean is detached (iDDPM, section 3.1)
            vb = self.variational_bound(prediction.detach(), variance_output, x0, noise, timesteps)
            sample_losses = mse + vb
        loss = sample_losses.mean() if self.uncertainty is None else self.uncertainty(sample_losses, timesteps)
        return DiffusionObjectiveOutput(loss=loss, sample_losses=sample_losses, mse=mse, vb=vb)

    def predict_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.LongTensor) -> torch.Tensor:
        """x̂0 (B, C, H, W) from the model's prediction."""
        alpha, sigma = self._at(self.alpha, timesteps), self._at(self.sigma, timesteps)
        return to_x0(prediction, x_t, alpha, sigma, self.prediction_type)

    def log_variance(self, variance_output: torch.Tensor, timesteps: torch.LongTensor) -> torch.Tensor:
        """log σ² (B, C, H, W) = f·log β_t + (1 - f)·log β̃_t (iDDPM, equation 15), f as `variance_type` reads it."""
        share = VARIANCE_TYPES[self.variance_type](variance_output)
        return torch.lerp(self._at(self.log_posterior_variance, timesteps), self._at(self.log_beta, timesteps), share)

    def posterior_mean(self, x0: torch.Tensor, x_t: torch.Tensor, timesteps: torch.LongTensor) -> torch.Tensor:
        """The mean (B, C, H, W) of q(x_{t-1} | x_t, x0) (DDPM, equation 7)."""
        return self._at(self.posterior_x0, timesteps) * x0 + self._at(self.posterior_xt, timesteps) * x_t

    def variational_bound(
        self,
        prediction: torch.Tensor,
        variance_output: torch.Tensor,
        x0: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.LongTensor,
    ) -> torch.Tensor:
        """
        The term L_t of the variational bound (B,), in bits per dimension: KL(q(x_{t-1}|x_t,x0) ‖ p(x_{t-1}|x_t)), and at
        t = 0 the discretised Gaussian's negative log-likelihood (DDPM, equations 5 and 13).
        """
        x_t = noisy_sample(x0, noise, self._at(self.alpha, timesteps), self._at(self.sigma, timesteps))
        mean = self.posterior_mean(self.predict_x0(prediction, x_t, timesteps), x_t, timesteps)
        log_variance = self.log_variance(variance_output, timesteps)

        true_mean = self.posterior_mean(x0, x_t, timesteps)
        true_log_variance = self._at(self.log_posterior_variance, timesteps)
        nats = torch.where(
            (timesteps == 0).view(-1, 1, 1, 1),
            -discretised_gaussian_log_likelihood(x0, mean, log_variance / 2),
            normal_kl(true_mean, true_log_variance, mean, log_variance),
        )
        return nats.flatten(1).mean(1) / math.log(2)

    def _target(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return velocity(x0, noise, self._at(self.alpha, timesteps), self._at(self.sigma, timesteps))
        return x0

    @staticmethod
    def _at(table: torch.Tensor, timesteps: torch.LongTensor) -> torch.Tensor:
        return table[timesteps].view(-1, 1, 1, 1)


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(μ1, σ1²) ‖ N(μ2, σ2²)) in nats, elementwise."""
    # ½·(log(σ2²/σ1²) - 1 + σ1²/σ2² + (μ1 - μ2)²/σ2²)
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretised_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """
    log P(x) in nats, elementwise, of 8-bit pixels in [-1, 1] under a Gaussian (DDPM, equation 13): its mass within half
    a grey level of x, the outermost levels reaching to infinity.
    """

    def cdf(value: torch.Tensor) -> torch.Tensor:
        # Φ(z) ≈ ½·(1 + tanh(√(2/π)·(z + 0.044715·z³))), the published approximation
        z = value * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half_level = 1 / 255
    upper = torch.where(x > 0.999, 1.0, cdf(x - mean + half_level))
    lower = torch.where(x < -0.999, 0.0, cdf(x - mean - half_level))
    return (upper - lower).clamp(min=1e-12).log()
