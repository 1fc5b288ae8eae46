"""The loss of a denoiser in continuous time: flow matching. https://arxiv.org/abs/2210.02747, https://arxiv.org/abs/2209.03003

Legend: B batch, T training timesteps; x_t = (1-σ)·x0 + σ·ε with t = σ·T; the model predicts ε - x0.
"""

import torch
from diffusers import SchedulerMixin

from ...diffusion.noise import flow_signal_to_noise_ratio
from ...diffusion.predictions import flow_velocity
from ...intervals import NoiseIntervals
from .densities import NoiseDensity
from .noising import FlowNoising
from .objective import NoisedBatch, Objective, ObjectiveOutput
from .shifts import ResolutionShift
from .weighting import UncertaintyWeighting, loss_weighting

NUM_UNCERTAINTY_CLUSTERS = 8  # DTR, section 5.1


class FlowObjective(Objective):
    """
    The weighted squared error of a predicted velocity, at noise levels from a density.

    Args:
        scheduler, density, resolution_shift: See [`FlowNoising`].
        weighting (`str`): See [`loss_weighting`]. With 'uw' the module has parameters, which need a learning rate of their own.
        uncertainty_learning_rate (`float`): For the parameters of 'uw'.

    Raises:
        ValueError: if the scheduler is of another process, or the weighting is unknown.
    """

    prediction_type = "flow_prediction"

    def __init__(
        self,
        scheduler: SchedulerMixin,
        density: NoiseDensity | None = None,
        resolution_shift: ResolutionShift | None = None,
        weighting: str = "constant",
        uncertainty_learning_rate: float = 0.025,
    ):
        super().__init__(FlowNoising(scheduler, density, resolution_shift))
        self.weighting = loss_weighting(weighting, self.prediction_type)
        self.uncertainty: UncertaintyWeighting | None = None
        if weighting == "uw":
            self.train_intervals = NoiseIntervals.uniform(NUM_UNCERTAINTY_CLUSTERS, self.noising.num_train_timesteps)
            self.uncertainty = UncertaintyWeighting(self.train_intervals)
            self.learning_rate = uncertainty_learning_rate

    def forward(self, model_output: torch.Tensor, batch: NoisedBatch) -> ObjectiveOutput:
        """
        The loss of a batch, in float32.

        Args:
            model_output (`torch.Tensor` of shape (B, …)): The predicted velocity.
            batch ([`NoisedBatch`]): What x_t is made of.

        Raises:
            ValueError: if the output is not of the samples' shape.
        """
        if model_output.shape != batch.x0.shape:
            raise ValueError(
                f"Expected `model_output` to have the samples' shape {tuple(batch.x0.shape)}, but got "
                f"{tuple(model_output.shape)}; with flow matching no variance is learned."
            )
        error = (model_output.float() - flow_velocity(batch.x0.float(), batch.noise.float())) ** 2
        sample_losses = self.weights(batch.timesteps) * error.flatten(1).mean(1)
        loss = sample_losses.mean() if self.uncertainty is None else self.uncertainty(sample_losses, batch.timesteps)
        return ObjectiveOutput(loss=loss, sample_losses=sample_losses)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The weights of the squared error of the velocity.

        Some have their limits at σ = 0 only, and `sigma_sqrt` has none: below t = 1, they are those of t = 1.

        Args:
            timesteps (`torch.Tensor` of shape (B,)): In [0, T].

        Returns:
            `torch.Tensor` of shape (B,), float32.
        """
        sigma = timesteps.float().clamp(min=1) / self.noising.num_train_timesteps
        return self.weighting(flow_signal_to_noise_ratio(sigma))
