"""The scheduler of one call: which timesteps it visits, what it is given, and which denoiser makes each of its steps.

Learned variance: https://arxiv.org/abs/2102.09672. Legend: S denoising steps.
"""

import inspect
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import is_flow_matching, scheduler_setting
from ..diffusion.noise_schedules import PURE_NOISE_SNR, clips, with_noise_schedule, without_pure_noise
from ..diffusion.predictions import expected_prediction_type, noise_levels
from ..diffusion.timesteps import check_timesteps, check_train_timesteps, move_sigmas_to_samples
from ..intervals import NoiseIntervals
from .expert_steps import experts_at

LEARNED_VARIANCES = ("learned", "learned_range")
_STEP_INPUTS = {"model_output", "timestep", "sample"}
_NEEDED = {"prev_timestep", "stage_index"}  # optional arguments without which UnCLIP's and Helios' schedulers go wrong
# It looks at differences between steps in time, which is ln(α/σ), as second-order schedulers do in σ/α: infinite in pure noise.
_NEEDS_SIGNAL = ("SASolverScheduler",)
# their `step` takes no predictions of x0, which are therefore converted into ε
_WITHOUT_X0 = (
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)


def with_trained_noise(scheduler: SchedulerMixin, trained: SchedulerMixin) -> SchedulerMixin:
    """
    Give a scheduler the noise schedule that a pipeline's denoisers were trained with; see [`with_noise_schedule`].

    Args:
        scheduler ([`SchedulerMixin`]): The pipeline's scheduler.
        trained ([`SchedulerMixin`]): A scheduler with the noise of training; see [`scheduler_of_training`].

    Raises:
        ValueError: if the scheduler was given another noise schedule, or only one of them is a flow-matching one.
    """
    if is_flow_matching(scheduler) != is_flow_matching(trained):
        raise ValueError(
            f"Expected `scheduler` to have noise like that of the {type(trained).__name__} that the denoisers were trained with, "
            f"but got a {type(scheduler).__name__}: only one of them is a flow-matching one."
        )
    same = with_noise_schedule(scheduler, trained)
    return scheduler if same is scheduler else _guided_as(scheduler, same)


def prepare_scheduler(scheduler: SchedulerMixin, denoisers: list[ModelMixin]) -> tuple[SchedulerMixin, bool]:
    """
    Choose whether a scheduler is given the denoisers' variance channels.

    Only the DDPM schedulers use a learned variance. Others get the prediction alone.

    Args:
        scheduler ([`SchedulerMixin`]): The pipeline's scheduler.
        denoisers (`list[ModelMixin]`): The pipeline's denoisers.

    Returns:
        The scheduler to use, and whether it is given the variance channels.

    Raises:
        ValueError: if the scheduler wants a learned variance, but a denoiser has no variance channels.
    """
    if scheduler.config.get("variance_type") not in LEARNED_VARIANCES:
        return scheduler, False
    if not isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        # with a learned variance, the DPM-Solver family would use only the first 3 channels of the prediction
        return _with_settings(scheduler, variance_type=None), False
    for config in (denoiser.config for denoiser in denoisers):
        if config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"Expected the scheduler's `variance_type` to be a fixed one for a model of {config.in_channels} input "
                f"and {config.out_channels} output channels, but got {scheduler.config.variance_type!r}."
            )
    return scheduler, True


def check_scheduler(scheduler: SchedulerMixin, prediction_types: list[str]) -> None:
    """
    Check that a scheduler fits denoisers, which docs/schedulers.md lists for all of Diffusers' schedulers.

    Args:
        scheduler ([`SchedulerMixin`]): The pipeline's scheduler.
        prediction_types (`list[str]`): What each denoiser predicts.

    Raises:
        ValueError: if the scheduler's `step` needs more than a prediction, its noise levels are not those of training, or
            it is a flow-matching one and the denoisers are not, or the other way round.
    """
    name = type(scheduler).__name__
    step, begin = (getattr(scheduler, method, None) for method in ("step", "set_timesteps"))
    if step is None or begin is None:
        raise ValueError(
            f"Expected `scheduler` to be one that steps from noise to images, but got a {name}, which has no `step`."
        )
    inputs = inspect.signature(step).parameters
    needed = {key for key, parameter in inputs.items() if parameter.default is parameter.empty} - _STEP_INPUTS
    needed |= _NEEDED & (inputs.keys() | inspect.signature(begin).parameters.keys())
    if needed:
        raise ValueError(
            f"Expected `scheduler` to step from prediction, timestep and sample, but got a {name}, which also needs "
            f"{', '.join(sorted(needed))}."
        )
    flow = is_flow_matching(scheduler)
    has_training_levels = (
        hasattr(scheduler, "alphas_cumprod") and scheduler_setting(scheduler, "snr_shift_scale") is None
    )
    if not flow and not has_training_levels:
        raise ValueError(
            f"Expected `scheduler` to have the noise levels that the denoisers were trained with, but got a {name}, which "
            "has noise levels of its own; `DDIMScheduler.from_config(pipeline.scheduler.config)` works."
        )
    for prediction_type in prediction_types:
        if flow != (prediction_type == "flow_prediction"):
            kind, works = "a flow-matching", "FlowMatchEulerDiscreteScheduler()"
            if flow:
                kind, works = "another than a flow-matching", "DDIMScheduler.from_config(pipeline.scheduler.config)"
            raise ValueError(
                f"Expected `scheduler` to be {kind} one for a denoiser that predicts {prediction_type!r}, but got a {name} "
                f"with other noise levels; `{works}` works."
            )
    if not flow and scheduler_setting(scheduler, "use_beta_sigmas"):
        raise ValueError(
            f"Expected `use_beta_sigmas` to be False for a denoiser that is not a flow-matching one, but got a {name} with it, "
            "which has hardly any steps where there is little noise; `use_karras_sigmas=True` works."
        )
    if flow and expected_prediction_type(scheduler) != "flow_prediction":
        raise ValueError(
            "Expected the scheduler's `prediction_type` to be 'flow_prediction' together with `use_flow_sigmas`, but got "
            f"{expected_prediction_type(scheduler)!r}."
        )


def set_timesteps(
    scheduler: SchedulerMixin,
    denoisers: list[ModelMixin],
    prediction_types: list[str],
    num_inference_steps: int,
    timesteps: list[int] | None,
    device: torch.device | str,
) -> SchedulerMixin:
    """
    Set a scheduler's timesteps, and check that the denoisers know them and that the scheduler can begin at the first.

    Where a noise schedule ends in pure noise, an error of the predicted noise becomes an infinite one of the image. A
    scheduler that cannot begin there is replaced by one that begins a little later, in as many steps.

    The timesteps are on the CPU: where they are on an accelerator, many schedulers make the CPU wait for it at every step.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler.
        denoisers (`list[ModelMixin]`): The pipeline's denoisers.
        prediction_types (`list[str]`): What each of them predicts.
        num_inference_steps (`int`): S, if `timesteps` is None.
        timesteps (`list[int]`, *optional*): Descending timesteps.
        device: Where the samples are.

    Returns:
        The scheduler to use, its timesteps set.

    Raises:
        ValueError: if the scheduler takes no `timesteps`, was made for other training timesteps than a denoiser, or cannot
            begin at the first of `timesteps`; see also [`check_scheduler`].
    """
    check_scheduler(scheduler, prediction_types)
    num_train_timesteps = None
    for denoiser in denoisers:
        if denoiser.config.get("num_train_timesteps") is not None:
            num_train_timesteps = denoiser.config.num_train_timesteps
            check_train_timesteps(scheduler, num_train_timesteps)
    if expected_prediction_type(scheduler) == "sample" and type(scheduler).__name__ in _WITHOUT_X0:
        scheduler = _with_settings(scheduler, prediction_type="epsilon")
    _set_timesteps(scheduler, num_inference_steps, timesteps, device)
    if _begins_too_early(scheduler, prediction_types):
        if timesteps is None:
            scheduler = _guided_as(scheduler, without_pure_noise(scheduler))
            _set_timesteps(scheduler, num_inference_steps, None, device)
        elif not isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):  # they forget errors at each step
            last = without_pure_noise(scheduler).config.num_train_timesteps - 1
            raise ValueError(
                f"Expected `timesteps` to begin at {last} at most, where a {type(scheduler).__name__} can begin with this "
                f"noise schedule, but got {timesteps[0]}."
            )
    if num_train_timesteps is not None:
        check_timesteps(scheduler.timesteps, num_train_timesteps)
    return scheduler


def _set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | None, device: torch.device | str
) -> None:
    """Set the timesteps on the CPU, in the way that the scheduler takes them."""
    if timesteps is None:
        try:
            scheduler.set_timesteps(num_inference_steps, device="cpu")
        except ValueError as error:
            most = scheduler.config.get("num_train_timesteps", num_inference_steps)
            if num_inference_steps <= most:
                raise
            raise ValueError(
                f"Expected `num_inference_steps` to be at most {most} for a {type(scheduler).__name__}, "
                f"but got {num_inference_steps}."
            ) from error
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=timesteps, device="cpu")
    else:
        raise ValueError(
            f"Expected a scheduler that takes `timesteps`, but got a {type(scheduler).__name__}, which does not."
        )
    move_sigmas_to_samples(scheduler, device)
    if len(scheduler.timesteps) > 1 and scheduler.timesteps[0] < scheduler.timesteps[-1]:
        raise ValueError(
            f"Expected `scheduler` to go from noise to images, but got a {type(scheduler).__name__}, which goes back."
        )
    if hasattr(scheduler, "set_begin_index"):
        # or else it looks for the first timestep among all of them, where rounded ones may be there twice
        scheduler.set_begin_index(0)


def _begins_too_early(scheduler: SchedulerMixin, prediction_types: list[str]) -> bool:
    """Whether the first timestep, where there is nothing but noise, is one that the scheduler cannot begin with."""
    if is_flow_matching(scheduler) or len(scheduler.timesteps) == 0:
        return False
    alpha, sigma = (level[0].item() for level in noise_levels(scheduler))
    if alpha**2 >= PURE_NOISE_SNR * sigma**2:
        return False
    # x̂0 = (x_t - σ·ε) / α magnifies what is wrong with ε by σ/α
    predicts_noise = "epsilon" in (*prediction_types, expected_prediction_type(scheduler))
    return (
        type(scheduler).__name__ in _NEEDS_SIGNAL or scheduler.order > 1 or (predicts_noise and not clips(scheduler))
    )


def step_arguments(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """Return those of `generator` and `eta` (η of DDIM) that the scheduler's `step` takes."""
    parameters = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in parameters}


def owners_of_steps(scheduler: SchedulerMixin, intervals: NoiseIntervals | None) -> list[int]:
    """
    Find the denoiser that makes each step.

    Args:
        scheduler ([`SchedulerMixin`]): A scheduler whose timesteps are set.
        intervals ([`NoiseIntervals`], *optional*): Which denoiser owns which timesteps; None for a single denoiser.

    Returns:
        `list[int]` of length S: indices of denoisers.
    """
    if intervals is None:
        return [0] * len(scheduler.timesteps)
    timesteps = scheduler.timesteps
    # a step of a second-order scheduler has two evaluations: both are made by the denoiser that owns the first
    begins = torch.arange(len(timesteps)) // scheduler.order * scheduler.order
    runge_kutta = len(getattr(scheduler, "prk_timesteps", ()))  # PNDM's first steps have four evaluations each
    begins[:runge_kutta] = torch.arange(runge_kutta) // 4 * 4
    return experts_at(intervals, timesteps[begins]).tolist()


def _with_settings(scheduler: SchedulerMixin, **settings: Any) -> SchedulerMixin:
    """A new scheduler with other settings; a `GuidedScheduler` keeps its guidance."""
    # of a guided scheduler's class, `from_config` makes one without guidance
    return _guided_as(scheduler, type(scheduler).from_config(scheduler.config, **settings))


def _guided_as(scheduler: SchedulerMixin, unguided: SchedulerMixin) -> SchedulerMixin:
    """Put the guidance of a scheduler, and of the guided ones inside, around another."""
    if hasattr(scheduler, "around"):
        return scheduler.around(_guided_as(scheduler.scheduler, unguided))
    return unguided
