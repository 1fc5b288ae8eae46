"""The loss of a denoiser in continuous time: flow matching. https://arxiv.org/abs/2210.02747, https://arxiv.org/abs/2209.03003

Legend: B batch, C channels, E experts, T training timesteps; x_t = (1-σ)·x0 + σ·ε with t = σ·T; the model predicts ε - x0.
"""

import dataclasses
from collections.abc import Iterable

import torch
from diffusers import SchedulerMixin

from ...diffusion.noise import flow_signal_to_noise_ratio, is_flow_matching, levels_at, noisy_sample
from ...diffusion.predictions import flow_velocity
from ...intervals import NoiseIntervals
from .densities import MIN_SHARE, MIN_TRUNCATED_SHARE, NoiseDensity, owned_timesteps
from .objective import NoisedBatch, Objective, ObjectiveOutput
from .shifts import ResolutionShift
from .timesteps import StepExperts, evenly_spread, owners_of_samples
from .weighting import UncertaintyWeighting, loss_weighting

NUM_UNCERTAINTY_CLUSTERS = 8  # DTR, section 5.1


class FlowObjective(Objective):
    """
    The weighted squared error of a predicted velocity, at noise levels from a density.

    Args:
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler: a `FlowMatchEulerDiscreteScheduler`, or another one with
            `use_flow_sigmas`. It says T; its own shift is for sampling.
        density ([`NoiseDensity`], *optional*): Which noise levels come how often; by default all equally.
        resolution_shift ([`ResolutionShift`], *optional*): Shifts the density by the shape of the samples, instead of
            `density.shift`.
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
        super().__init__(scheduler)
        if not is_flow_matching(scheduler):
            raise ValueError(
                f"Expected a flow-matching `scheduler`, such as a FlowMatchEulerDiscreteScheduler, but got a "
                f"{type(scheduler).__name__} without flow sigmas."
            )
        self.density = density or NoiseDensity()
        self.resolution_shift = resolution_shift
        self.weighting = loss_weighting(weighting, self.prediction_type)
        self.num_train_timesteps: int = scheduler.config["num_train_timesteps"]
        self.uncertainty: UncertaintyWeighting | None = None
        if weighting == "uw":
            self.train_intervals = NoiseIntervals.uniform(NUM_UNCERTAINTY_CLUSTERS, self.num_train_timesteps)
            self.uncertainty = UncertaintyWeighting(self.train_intervals)
            self.learning_rate = uncertainty_learning_rate

    def sample_timesteps(
        self,
        batch_size: int,
        generator: torch.Generator,
        experts: StepExperts | None = None,
        sample_shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """
        Sample the timesteps of one optimiser step; see [`Objective.sample_timesteps`].

        Args:
            batch_size (`int`): B.
            generator (`torch.Generator`): Its device is the result's.
            experts ([`StepExperts`], *optional*): The density is truncated to the interval of each sample's expert; without
                them, to the clusters of 'uw', as many samples in each, or else it is the whole density.
            sample_shape (`tuple[int, ...]`): The shape of a sample without the batch, for a shift by resolution.

        Returns:
            `torch.Tensor` of shape (B,), float32: t = σ·T in [0, T].

        Raises:
            ValueError: if an interval has no probability, or B is not divisible by the number of clusters.
        """
        density = self.density_for(sample_shape)
        if experts is None:
            owners = evenly_spread(self.train_intervals.num_experts, batch_size)
            return density.sample(self.train_intervals, owners, generator)
        return density.sample(experts.intervals, owners_of_samples(experts.owners, batch_size), generator)

    def density_for(self, sample_shape: tuple[int, ...] | None = None) -> NoiseDensity:
        """
        Return the density for samples of one shape.

        Args:
            sample_shape (`tuple[int, ...]`): (C, …), which only a shift by resolution reads.

        Raises:
            ValueError: if there is a shift by resolution, but no shape.
        """
        if self.resolution_shift is None:
            return self.density
        if sample_shape is None:
            raise ValueError("Expected `sample_shape` for a shift by resolution, but got None.")
        return dataclasses.replace(self.density, shift=self.resolution_shift(sample_shape))

    def check_experts(self, intervals: NoiseIntervals, experts: Iterable[int], by_density: bool = False) -> None:
        """
        Check, before the first step, that experts have probability; see [`Objective.check_experts`].

        Args:
            intervals ([`NoiseIntervals`]): The intervals of all experts.
            experts (`Iterable[int]`): Those that are trained.
            by_density (`bool`): Whether they get the samples that the whole density brings. Then 10⁻⁴ is the least share.

        Raises:
            ValueError: if one has too little; its interval and share are named. See [`NoiseDensity.check_shares`].
        """
        densities = [self.density]
        if self.resolution_shift is not None:
            densities = [dataclasses.replace(self.density, shift=shift) for shift in self.resolution_shift.range]
        for density in densities:
            density.check_shares(intervals, experts, MIN_SHARE if by_density else MIN_TRUNCATED_SHARE)

    def evenly_spaced_timesteps(self, count: int, low: float, high: float) -> torch.Tensor:
        """
        Timesteps in the middle of equal parts of [low, high), in ascending order.

        Returns:
            `torch.Tensor` of shape (count,), float32, on the CPU.
        """
        middles = low + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (high - low)
        return middles.float().clamp(*owned_timesteps(low, high, self.num_train_timesteps))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The noisy samples x_t = (1-σ)·x0 + σ·ε.

        Args:
            x0 (`torch.Tensor` of shape (B, …)): The clean samples.
            noise (`torch.Tensor` of shape (B, …)): ε.
            timesteps (`torch.Tensor` of shape (B,)): As [`sample_timesteps`] returns them.
        """
        alpha, sigma = (level.view(-1, *[1] * (x0.ndim - 1)) for level in levels_at(self.scheduler, timesteps))
        return noisy_sample(x0, noise, alpha, sigma)

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
        sigma = timesteps.float().clamp(min=1) / self.num_train_timesteps
        return self.weighting(flow_signal_to_noise_ratio(sigma))
