"""The noise schedule of a scheduler: that of training, and without the pure noise where few solvers can begin.

DPM-Solver, appendix D.1, on where cosine schedules can begin: https://arxiv.org/abs/2206.00927.
"""

from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import are_same_levels, is_flow_matching, scheduler_setting, signal_to_noise_ratio

# A schedule that ends below the first of these signal-to-noise ratios ends in pure noise: cosine schedules do, at 2e-9, and
# linear ones do not, at 4e-5. Every solver can begin at the second one, and x_T ~ N(0, 1) is still right there.
PURE_NOISE_SNR = 1e-5
FIRST_SNR = 4e-4
_NOISE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def without_pure_noise(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    Make a scheduler like a given one for the first of its training timesteps only: those that still have some signal.

    It visits as many timesteps as the given one, spaced in the same way, and begins where the SNR is above `FIRST_SNR`.
    Timestep and noise level of a sample belong together as before.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose class takes `trained_betas`.
    """
    count = int((signal_to_noise_ratio(scheduler.alphas_cumprod.double()) > FIRST_SNR).sum())
    settings: dict[str, Any] = {"trained_betas": scheduler.betas[:count].tolist(), "num_train_timesteps": count}
    if scheduler_setting(scheduler, "rescale_betas_zero_snr") is not None:
        settings["rescale_betas_zero_snr"] = False  # these betas are rescaled already
    shorter = type(scheduler).from_config(scheduler.config, **settings)
    # read by `check_train_timesteps`
    shorter.register_to_config(model_train_timesteps=scheduler.config.num_train_timesteps)
    return shorter


def with_noise_schedule(scheduler: SchedulerMixin, trained: SchedulerMixin) -> SchedulerMixin:
    """
    Give a scheduler the noise schedule of training, unless it was made with another one.

    `from_config` drops what the given configuration has by default, and the defaults differ: made from the configuration of
    a `DDPMScheduler()`, a `HeunDiscreteScheduler` has another `beta_start` and `beta_end`.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler to sample with.
        trained ([`SchedulerMixin`]): A scheduler with the noise schedule that the denoisers were trained with.

    Returns:
        The scheduler, or one like it whose betas are those of training.

    Raises:
        ValueError: if the scheduler was given a noise schedule that is not the one of training.
    """
    expected, actual = (getattr(each, "alphas_cumprod", None) for each in (trained, scheduler))
    is_other_process = is_flow_matching(scheduler) or scheduler_setting(scheduler, "snr_shift_scale") is not None
    if is_other_process or expected is None or actual is None:  # nothing to compare
        return scheduler
    if are_same_levels(expected, actual):
        return scheduler
    by_default = scheduler.config.get("_use_default_values", [])
    chosen = {name: scheduler_setting(scheduler, name) for name in _NOISE_SETTINGS if name not in by_default}
    others = [
        name for name, value in chosen.items() if value is not None and str(value) != str(trained.config.get(name))
    ]
    if others:
        name = type(scheduler).__name__
        got, right = (", ".join(f"{key}={each.config.get(key)!r}" for key in others) for each in (scheduler, trained))
        raise ValueError(
            f"Expected `scheduler` to have the noise schedule that the pipeline was made with, but got a {name} with "
            f"{got:.200}; `{name}.from_config(pipeline.scheduler.config, {right:.200})` works."
        )
    count = len(trained.betas)
    return type(scheduler).from_config(
        scheduler.config, trained_betas=trained.betas.tolist(), num_train_timesteps=count
    )


def clips(scheduler: SchedulerMixin) -> bool:
    """Tell whether a scheduler clips the clean samples that a prediction implies, x̂0."""
    if "TCD" in type(scheduler).__name__:
        return False  # it has the settings, but does not read them
    return bool(scheduler_setting(scheduler, "clip_sample") or scheduler_setting(scheduler, "thresholding"))
