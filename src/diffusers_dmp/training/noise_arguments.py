"""The arguments of the noise that a training adds, what is learned of it, and where experts divide it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .fields import option
from .objectives.shifts import parsed_shift

if TYPE_CHECKING:
    from ..intervals import NoiseIntervals
    from .objectives.densities import NoiseDensity

OBJECTIVES = ("ddpm", "flow")
BOUNDARIES = ("sigma_boundaries", "timestep_boundaries", "snr_boundaries")
_OF_FLOW = ("density", "logit_mean", "logit_std", "mode_scale", "shift")


@dataclass(kw_only=True)
class NoiseArguments:
    """The noise schedule."""

    num_train_timesteps: int = option(1000, "T, the number of training timesteps.")
    beta_schedule: str = option(
        "linear",
        "Schedule of Diffusers' DDPMScheduler: linear, scaled_linear, squaredcos_cap_v2, …; linear0.025 is linear up to "
        "that beta.",
    )
    beta_start: float = option(1e-4, "First beta of the linear schedules.")
    beta_end: float = option(0.02, "Last beta of the linear schedules.")


@dataclass(kw_only=True)
class ProcessArguments:
    """The noise process, and how often which of its noise levels is trained."""

    objective: str = option("ddpm", "The noise process: ddpm, or flow for flow matching.")
    density: str = option(
        "logit_normal", "For flow: how often which noise level is trained: logit_normal, uniform, mode or cosmap."
    )
    logit_mean: float = option(0.0, "For logit_normal: the mean of log(σ / (1 - σ)); above 0 for more noise.")
    logit_std: float = option(1.0, "For logit_normal: its standard deviation.")
    mode_scale: float = option(1.29, "For mode: how much more often the noise levels in the middle are trained.")
    shift: str | None = option(
        None,
        "For flow: a shift of the density towards the noise, such as 3; or resolution, by the number of tokens of a sample. By "
        "default that of the pretrained pipeline's scheduler, 1 without one.",
    )

    def check_process(self) -> None:
        """
        Check the noise process and its density, and bring them into the form that they are recorded in.

        Raises:
            ValueError: if an argument is unknown, or one of flow matching is set for another process.
        """
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Expected `objective` to be one of {', '.join(OBJECTIVES)}, but got {self.objective!r}.")
        if self.shift is not None:
            shift = parsed_shift(self.shift)
            self.shift = shift if isinstance(shift, str) else repr(shift)  # YAML may have made a number of it
        self.noise_density()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _OF_FLOW:
            value = getattr(self, name)
            if self.objective != "flow" and value != defaults[name]:
                raise ValueError(
                    f"Expected `objective` to be flow where `{name}` is set, but got {self.objective} and {value!r}."
                )

    def noise_density(self, shift: float = 1.0) -> "NoiseDensity":
        """
        The density over the noise levels of flow matching.

        Args:
            shift (`float`): Its shift.

        Raises:
            ValueError: if there is no such density.
        """
        from .objectives.densities import NoiseDensity  # which imports Diffusers: that takes seconds

        return NoiseDensity(
            name=self.density,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            shift=shift,
        )


@dataclass(kw_only=True)
class ObjectiveArguments(ProcessArguments):
    """The noise process and the loss of a denoiser."""

    prediction_type: str | None = option(
        None,
        "What the model predicts: epsilon (the default of ddpm), sample (x0) or v_prediction; flow_prediction (the velocity) "
        "for flow.",
    )
    learn_sigma: bool | None = option(
        None, "Whether the model learns the variance as well, for ddpm alone; by default it does."
    )
    weighting: str = option("constant", "Loss weighting: constant, min_snr_5, p2_1_1, snr, uw, …")
    uncertainty_learning_rate: float = option(0.025, "Learning rate of the log-variances of the weighting `uw`.")

    def resolve_objective(self) -> None:
        """
        Set what the objective decides by default, and check what it does not have.

        Raises:
            ValueError: if an argument is unknown, or is one of the other objective.
        """
        self.check_process()
        is_flow = self.objective == "flow"
        self.learn_sigma = not is_flow if self.learn_sigma is None else self.learn_sigma
        default = "flow_prediction" if is_flow else "epsilon"
        self.prediction_type = self.prediction_type or default
        if is_flow and self.learn_sigma:
            raise ValueError(
                "Expected `learn_sigma` to be false for flow matching, which has no variance to learn, but got true."
            )
        if is_flow and self.prediction_type != default:
            raise ValueError(
                f"Expected `prediction_type` to be {default} for flow matching, but got {self.prediction_type!r}."
            )


@dataclass(kw_only=True)
class BoundaryArguments:
    """The noise intervals of experts: between boundaries, or of equally many timesteps."""

    sigma_boundaries: list[float] = option(
        [], "The σ between the experts, ascending, for flow matching: 0.875 makes two, as Wan2.2 has them."
    )
    timestep_boundaries: list[float] = option([], "Or the training timesteps between them, ascending.")
    snr_boundaries: list[float] = option([], "Or the signal-to-noise ratios between them, descending.")
    num_experts: int | None = option(None, "Or the number of experts, with intervals of equally many timesteps.")

    @property
    def given_boundaries(self) -> list[str]:
        """The names of the boundaries that are given."""
        return [name for name in BOUNDARIES if getattr(self, name)]

    def count_experts(self) -> int:
        """The number of experts; 1 without intervals."""
        if not self.given_boundaries:
            return self.num_experts or 1
        return 1 + sum(len(getattr(self, name)) for name in BOUNDARIES)

    def intervals(self, scheduler: Any) -> "NoiseIntervals":
        """
        The experts' intervals.

        Args:
            scheduler ([`SchedulerMixin`]): For T and what SNR its timesteps have.

        Raises:
            ValueError: if the boundaries do not ascend (of SNR, descend), or lie outside of what there is; if they are σ, and the
                scheduler is no flow-matching one.
        """
        from ..diffusion.noise import is_flow_matching  # which imports Diffusers
        from ..intervals import NoiseIntervals

        total = scheduler.config["num_train_timesteps"]
        if self.sigma_boundaries and not is_flow_matching(scheduler):
            raise ValueError(
                f"Expected `sigma_boundaries` for flow matching alone, but got {self.sigma_boundaries} for a "
                f"{type(scheduler).__name__}; `snr_boundaries` and `timestep_boundaries` are for diffusion as well."
            )
        if self.sigma_boundaries:
            return NoiseIntervals.from_sigmas(self.sigma_boundaries, total)
        if self.timestep_boundaries:
            return NoiseIntervals.from_timesteps(self.timestep_boundaries, total)
        if self.snr_boundaries:
            return NoiseIntervals.from_snr(self.snr_boundaries, scheduler)
        return NoiseIntervals.uniform(self.count_experts(), total)
