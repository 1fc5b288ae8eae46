"""The loss of a denoiser in discrete time: DDPM with a fixed or learned variance.
https://arxiv.org/abs/2006.11239 (DDPM), https://arxiv.org/abs/2102.09672 (iDDPM)

Diffusers' schedulers carry the diffusion process, but not this loss.

Legend: B batch, C channels, T training timesteps; x_t = √ᾱ_t·x0 + √(1-ᾱ_t)·ε.
"""

import math
from typing import Any

import torch

from ...diffusion.noise import alpha_sigma, noisy_sample
from ...diffusion.predictions import PREDICTION_TYPES, posterior_weights, to_x0, velocity
from ...diffusion.variance import VARIANCE_TYPES
from ...intervals import NoiseIntervals
from .objective import NoisedBatch, Objective, ObjectiveOutput
from .weighting import UncertaintyWeighting, loss_weights

NUM_UNCERTAINTY_CLUSTERS = 8  # DTR, section 5.1


class DiffusionObjective(Objective):
    """
    The weighted squared error of what a denoiser predicts, plus, for a learned variance, the variational bound.

    Args:
        scheduler: A Diffusers scheduler with `betas`; its `prediction_type` ('epsilon', 'sample' or 'v_prediction') is
            what the model predicts.
        weighting (`str`): See [`loss_weights`]. With 'uw' the module has parameters, which need a learning rate of
            their own.
        variance_type (`str`, *optional*): 'learned_range' or 'learned_range_sigmoid' for a model of 2C output channels;
            None for a model of C, whose variance is fixed.
        uncertainty_learning_rate (`float`): For the parameters of 'uw'.

    Raises:
        ValueError: if the weighting, the prediction type or the variance type is unknown.
    """

    # buffers of shape (T,)
    weights: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    log_beta: torch.Tensor
    log_posterior_variance: torch.Tensor
    posterior_x0: torch.Tensor
    posterior_xt: torch.Tensor

    def __init__(
        self,
        scheduler: Any,
        weighting: str = "constant",
        variance_type: str | None = None,
        uncertainty_learning_rate: float = 0.025,
    ):
        super().__init__(scheduler)
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
        alpha, sigma = alpha_sigma(alphas_cumprod)
        tables = {
            "weights": loss_weights(weighting, alphas_cumprod, self.prediction_type),
            "alpha": alpha,
            "sigma": sigma,
            "log_beta": betas.log(),
            "log_posterior_variance": posterior_variance.log(),
            "posterior_x0": posterior_x0,
            "posterior_xt": posterior_xt,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)  # (T,)

        self.uncertainty: UncertaintyWeighting | None = None
        if weighting == "uw":
            self.train_intervals = NoiseIntervals.uniform(NUM_UNCERTAINTY_CLUSTERS, len(betas))
            self.uncertainty = UncertaintyWeighting(self.train_intervals)
            self.learning_rate = uncertainty_learning_rate

    def forward(self, model_output: torch.Tensor, batch: NoisedBatch) -> ObjectiveOutput:
        """
        The loss of a batch.

        Args:
            model_output (`torch.Tensor` of shape (B, C or 2C, …)): The model's output for x_t.
            batch ([`NoisedBatch`]): Its timesteps are integer steps in [0, T), (B,).

        Raises:
            ValueError: if the model's channels are not those that `variance_type` wants.
        """
        channels = batch.x0.shape[1]
        expected_channels = channels * (1 if self.variance_type is None else 2)
        if model_output.shape[1] != expected_channels:
            raise ValueError(
                f"Expected `model_output` to have {expected_channels} channels, for data of {channels} and "
                f"`variance_type` {self.variance_type!r}, but got {model_output.shape[1]}."
            )
        model_output = model_output.float()  # the bound's logarithms and differences need the precision
        prediction, variance_output = model_output[:, :channels], model_output[:, channels:]
        sample_losses = self.weighted_squared_error(prediction, batch)
        if self.variance_type is not None:
            sample_losses = sample_losses + self.variational_bound(prediction, variance_output, batch)
        loss = sample_losses.mean() if self.uncertainty is None else self.uncertainty(sample_losses, batch.timesteps)
        return ObjectiveOutput(loss=loss, sample_losses=sample_losses)

    def weighted_squared_error(self, prediction: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
        """The squared error of the prediction (B, C, …), averaged over each sample and weighted by its timestep: (B,)."""
        error = (self._target(batch) - prediction) ** 2
        return self.weights[batch.timesteps] * error.flatten(1).mean(1)

    def predict_x0(self, prediction: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x̂0 (B, C, …) from the model's prediction."""
        alpha, sigma = self._at(self.alpha, timesteps, x_t), self._at(self.sigma, timesteps, x_t)
        return to_x0(prediction, x_t, alpha, sigma, self.prediction_type)

    def log_variance(self, variance_output: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """log σ² (B, C, …) = f·log β_t + (1 - f)·log β̃_t (iDDPM, equation 15), with f as `variance_type` defines it."""
        share = VARIANCE_TYPES[str(self.variance_type)](variance_output)
        log_posterior_variance = self._at(self.log_posterior_variance, timesteps, share)
        return torch.lerp(log_posterior_variance, self._at(self.log_beta, timesteps, share), share)

    def posterior_mean(self, x0: torch.Tensor, x_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The mean (B, C, …) of q(x_{t-1} | x_t, x0) (DDPM, equation 7)."""
        return self._at(self.posterior_x0, timesteps, x0) * x0 + self._at(self.posterior_xt, timesteps, x_t) * x_t

    def variational_bound(
        self, prediction: torch.Tensor, variance_output: torch.Tensor, batch: NoisedBatch
    ) -> torch.Tensor:
        """
        The term L_t of the variational bound (B,), in bits per dimension.

        L_t = KL(q(x_{t-1}|x_t,x0) ‖ p(x_{t-1}|x_t)), and at t = 0 the negative log-likelihood of the discretised Gaussian
        (DDPM, equations 5 and 13). It trains the variance alone: the prediction is detached (iDDPM, section 3.1).

        Args:
            prediction (`torch.Tensor` of shape (B, C, …)): What the model predicts of x_t.
            variance_output (`torch.Tensor` of shape (B, C, …)): Its variance channels.
            batch ([`NoisedBatch`]): What x_t is made of.
        """
        x0, timesteps = batch.x0, batch.timesteps
        alpha, sigma = self._at(self.alpha, timesteps, x0), self._at(self.sigma, timesteps, x0)
        x_t = noisy_sample(x0, batch.noise, alpha, sigma)
        mean = self.posterior_mean(self.predict_x0(prediction.detach(), x_t, timesteps), x_t, timesteps)
        log_variance = self.log_variance(variance_output, timesteps)

        true_mean = self.posterior_mean(x0, x_t, timesteps)
        true_log_variance = self._at(self.log_posterior_variance, timesteps, x0)
        nats = torch.where(
            (timesteps == 0).view(alpha.shape),
            -discretised_gaussian_log_likelihood(x0, mean, log_variance / 2),
            normal_kl(true_mean, true_log_variance, mean, log_variance),
        )
        return nats.flatten(1).mean(1) / math.log(2)

    def _target(self, batch: NoisedBatch) -> torch.Tensor:
        """What the model should predict."""
        if self.prediction_type == "epsilon":
            return batch.noise
        if self.prediction_type == "v_prediction":
            alpha = self._at(self.alpha, batch.timesteps, batch.x0)
            return velocity(batch.x0, batch.noise, alpha, self._at(self.sigma, batch.timesteps, batch.x0))
        return batch.x0

    @staticmethod
    def _at(table: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The entries (B, 1, …, 1) of a table (T,) at each sample's timestep, broadcastable to `like` (B, …)."""
        return table[timesteps].view(-1, *[1] * (like.ndim - 1))


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(μ1, σ1²) ‖ N(μ2, σ2²)) in nats, elementwise."""
    # ½·(log(σ2²/σ1²) - 1 + σ1²/σ2² + (μ1 - μ2)²/σ2²)
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretised_gaussian_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """
    log P(x) in nats, elementwise, of 8-bit pixels in [-1, 1] under a Gaussian (DDPM, equation 13).

    P(x) is the Gaussian's mass within half a grey level of x; the two outermost grey levels reach to infinity.
    """

    def cdf(value: torch.Tensor) -> torch.Tensor:
        # Φ(z) ≈ ½·(1 + tanh(√(2/π)·(z + 0.044715·z³))), the published approximation
        z = value * torch.exp(-log_scale)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    half_level = 1 / 255
    upper = torch.where(x > 0.999, 1.0, cdf(x - mean + half_level))
    lower = torch.where(x < -0.999, 0.0, cdf(x - mean - half_level))
    return (upper - lower).clamp(min=1e-12).log()
