"""The noise schedule of a scheduler: that of training, as a record, and without the pure noise where few solvers can begin.

DPM-Solver, appendix D.1, on where cosine schedules can begin: https://arxiv.org/abs/2206.00927.
"""

from typing import Any

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import are_same_levels, is_flow_matching, scheduler_setting, signal_to_noise_ratio

# A schedule that ends below the first of these signal-to-noise ratios ends in pure noise: cosine schedules do, at 2e-9, and
# linear ones do not, at 4e-5. Every solver can begin at the second one, and x_T ~ N(0, 1) is still right there.
PURE_NOISE_SNR = 1e-5
FIRST_SNR = 4e-4
_NOISE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
_RECORDED = {
    "diffusion": (*_NOISE_SETTINGS, "rescale_betas_zero_snr"),
    "flow_matching": ("num_train_timesteps",),
}  # settings by process


def noise_schedule_of(scheduler: SchedulerMixin) -> "dict[str, Any] | None":
    """
    Record the noise that denoisers which belong to a scheduler were trained with.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers.

    Returns:
        `dict`, which JSON can store: the `process`, "diffusion" or "flow_matching", the `prediction_type` of a denoiser that
        does not state its own, and for diffusion the settings of a [`DDPMScheduler`] with this noise. None if the noise levels
        are those of neither.
    """
    # that of a flow-matching scheduler is left from the configuration it was made of: what the denoiser was trained for
    prediction_type = scheduler.config.get("prediction_type") or "flow_prediction"
    if is_flow_matching(scheduler):
        count = scheduler.config.get("num_train_timesteps", 1000)
        return {"process": "flow_matching", "prediction_type": prediction_type, "num_train_timesteps": count}
    settings = {name: scheduler_setting(scheduler, name) for name in _RECORDED["diffusion"]}
    settings = {name: value for name, value in settings.items() if value is not None and name != "trained_betas"}
    betas = getattr(scheduler, "betas", None)
    candidates = [settings] if scheduler_setting(scheduler, "trained_betas") is None else []
    if betas is not None:
        given = {name: value for name, value in settings.items() if name != "rescale_betas_zero_snr"}
        candidates.append(given | {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)})
    for candidate in candidates:
        record = {"process": "diffusion", "prediction_type": prediction_type} | candidate
        if _has_levels_of(record, scheduler):
            return record
    return None


def scheduler_of_training(noise_schedule: "dict[str, Any]") -> SchedulerMixin:
    """
    Make a scheduler with the noise of a record.

    Args:
        noise_schedule (`dict`): See [`noise_schedule_of`].

    Raises:
        ValueError: if it is no such record.
    """
    settings = dict(noise_schedule) if isinstance(noise_schedule, dict) else {}
    process, prediction_type = settings.pop("process", None), settings.pop("prediction_type", None)
    if process not in _RECORDED or prediction_type is None or settings.keys() - set(_RECORDED[process]):
        raise ValueError(
            "Expected `noise_schedule` to have a `process`, 'diffusion' or 'flow_matching', a `prediction_type`, and for "
            f"diffusion {', '.join(_RECORDED['diffusion'])}, but got {noise_schedule!r:.200}."
        )
    if process == "flow_matching":
        scheduler = FlowMatchEulerDiscreteScheduler(**settings)
        scheduler.register_to_config(prediction_type=prediction_type)
        return scheduler
    try:
        return DDPMScheduler(prediction_type=prediction_type, **settings)
    except (NotImplementedError, TypeError) as error:
        raise ValueError(f"Expected `noise_schedule` to be one of a DDPMScheduler, but got {error}") from error


def _has_levels_of(noise_schedule: "dict[str, Any]", scheduler: Any) -> bool:
    """Whether a record gives the noise levels of a scheduler."""
    levels = getattr(scheduler, "alphas_cumprod", None)
    try:
        return levels is not None and are_same_levels(scheduler_of_training(noise_schedule).alphas_cumprod, levels)
    except ValueError:  # betas by a rule that `DDPMScheduler` does not have
        return False


def ends_in_pure_noise(scheduler: SchedulerMixin) -> bool:
    """Tell whether nothing of the image is left at the last training timestep, as with cosine schedules."""
    return signal_to_noise_ratio(scheduler.alphas_cumprod[-1].double()).item() < PURE_NOISE_SNR


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
