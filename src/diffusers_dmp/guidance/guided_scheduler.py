"""Guidance by a vision network for any pipeline: in the scheduler, which sees x_t, t and the denoiser's prediction.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233, algorithms 1 and 2

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels, T diffusion timesteps.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import are_same_levels
from ..diffusion.predictions import PREDICTION_TYPES, check_noise_levels, expected_prediction_type, noise_levels
from .experts import GuidanceExperts
from .gradient import Guidance, NoisyStep, check_setting
from .steps import guided_prediction, step_with_guided_mean, unclipped
from .targets import GuidanceTarget

# With a smaller α, x_t has no image to guide: at ᾱ = 0, or the 2⁻²⁴ that some schedulers replace it by.
MIN_ALPHA = 1e-3
_OWN_ATTRIBUTES = ("scheduler", "guidance", "_noise_levels")


def _setting(name: str) -> property:
    """An attribute that a guided scheduler has from its own guidance."""

    def get(self: "GuidedScheduler") -> Any:
        return getattr(self.guidance, name)

    def change(self: "GuidedScheduler", value: Any) -> None:
        check_setting(name, value)
        setattr(self.guidance, name, value)

    return property(get, change)


class GuidedScheduler(SchedulerMixin):
    """
    A scheduler whose steps move towards samples in which a vision network sees what is asked for.

    ```py
    pipe.scheduler = GuidedScheduler(pipe.scheduler, experts, ClassTarget("zebra"), scale=7.5)
    ```

    The object that is made is an instance of both this class and the class of the given scheduler, of which it overrides
    `set_timesteps` and `step`. It is a copy: its timesteps, state and configuration are its own, and the given scheduler, which
    stays available as `scheduler`, does not change. Guidance is not saved: `save_pretrained`, also a pipeline's, writes the
    scheduler without it, and `from_config` makes one without it.

    DDPM schedulers are guided in the mean of their step, μ + σ²·s·∇log p. All others are guided in the noise,
    ε - √(1-ᾱ)·s·∇log p, where ε is that of the clipped x̂0 if the scheduler clips, as in the published code. A guided scheduler
    around another guided one asks for both things at once.

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers that has `alphas_cumprod`.
        experts ([`GuidanceExperts`]): The network that guides. It is moved to the samples' device, and put in float32 and eval
            mode.
        target ([`GuidanceTarget`]): What to ask for.
        scale (`float`): The guidance scale s.
        rescale_to_mean (`bool`): Rescale ∇log p to the norm of the mean, for each sample, as in the paper's text-to-image
            experiments (DDPM schedulers only).
        timestep_range (`tuple[float, float]`, *optional*): Guide only the timesteps low <= t < high.
        every (`int`): Guide every n-th step, beginning with the first one.
        vae ([`AutoencoderKL`], *optional*): For latents: x̂0 is decoded, in float32, and the experts see the decoded images.
        on_nonfinite (`str`): What to do where guidance is infinite or not a number in the samples' dtype. Such samples are not
            guided in that step. With 'unguided' that is all; with 'raise' a `FloatingPointError` is raised at the last of the
            timesteps (and not if a pipeline stops before it), so that no step waits for an accelerator.

    Warns:
        If the experts were trained at other noise levels than the scheduler's.

    Raises:
        ValueError: if the scheduler has no ᾱ or another number of training timesteps than the experts, an argument is out of
            range, or the target does not fit the experts' network.
    """

    unguided_class: "ClassVar[type[SchedulerMixin] | None]" = None

    scheduler: SchedulerMixin
    guidance: Guidance
    experts = _setting("experts")
    scale = _setting("scale")
    rescale_to_mean = _setting("rescale_to_mean")
    timestep_range = _setting("timestep_range")
    every = _setting("every")
    vae = _setting("vae")
    on_nonfinite = _setting("on_nonfinite")

    def __new__(cls, scheduler: SchedulerMixin, *args, **kwargs) -> "GuidedScheduler":
        """Make an instance of the class that is derived from this one and from the scheduler's."""
        if not hasattr(scheduler, "set_timesteps"):
            raise ValueError(f"Expected `scheduler` to be a scheduler of Diffusers, but got {scheduler!r}.")
        scheduler_class = scheduler.unguided_class if isinstance(scheduler, GuidedScheduler) else type(scheduler)
        return _new_instance(cls, scheduler_class)

    def __init__(
        self,
        scheduler: SchedulerMixin,
        experts: GuidanceExperts,
        target: GuidanceTarget,
        scale: float = 7.5,
        *,
        rescale_to_mean: bool = False,
        timestep_range: "tuple[float, float] | None" = None,
        every: int = 1,
        vae: AutoencoderKL | None = None,
        on_nonfinite: str = "raise",
    ):
        experts.intervals.check_scheduler(scheduler)
        check_noise_levels(scheduler)
        _warn_of_other_levels(experts, scheduler)
        kind = expected_prediction_type(scheduler)
        if kind not in PREDICTION_TYPES:
            raise ValueError(
                f"Expected the scheduler's `prediction_type` to be one of {', '.join(PREDICTION_TYPES)}, but got {kind!r}."
            )
        if rescale_to_mean and not self.guides_mean:
            raise ValueError(
                f"Expected a DDPMScheduler for `rescale_to_mean`, but got a {type(scheduler).__name__}, which has no mean."
            )
        state = {name: value for name, value in scheduler.__dict__.items() if name not in _OWN_ATTRIBUTES}
        self.__dict__.update(copy.deepcopy(state))
        self.scheduler = scheduler
        self.guidance = Guidance(
            experts, target, scale, rescale_to_mean, timestep_range, every, vae=vae, on_nonfinite=on_nonfinite
        )
        self._noise_levels: tuple[torch.Tensor, torch.Tensor] | None = None

    def __copy__(self) -> "GuidedScheduler":
        """A copy whose settings can be changed on their own; `copy.deepcopy` copies the experts as well."""
        copied = _new_instance(*type(self).__bases__)
        copied.__dict__.update(self.__dict__)
        copied.guidance = copy.copy(self.guidance)
        copied.guidance.reset()
        if isinstance(self.scheduler, GuidedScheduler):
            copied.scheduler = copy.copy(self.scheduler)
        return copied

    def __reduce__(self):
        """Copy and pickle without the name of the class, by which it cannot be imported."""
        return _new_instance, type(self).__bases__, self.__dict__

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, **kwargs) -> Any:
        """
        Make the scheduler without guidance; see [`ConfigMixin.from_config`]. [`around`] guides another scheduler.

        Raises:
            ValueError: if it is called on `GuidedScheduler` itself, which is no scheduler's class.
        """
        if cls.unguided_class is None:
            raise ValueError("Expected `from_config` of a scheduler's class, but got that of GuidedScheduler.")
        return cls.unguided_class.from_config(config, return_unused_kwargs, **kwargs)

    @property
    def target(self) -> GuidanceTarget:
        """What is asked for: a copy of what was given, with its classes looked up in the network of the experts."""
        return self.guidance.target

    @target.setter
    def target(self, target: GuidanceTarget) -> None:
        self.guidance.set_target(target)

    @property
    def guides_mean(self) -> bool:
        """Whether the mean of a step is guided, as for DDPM, or else the noise."""
        return isinstance(self, (DDPMScheduler, DDPMParallelScheduler))

    def around(self, scheduler: SchedulerMixin) -> "GuidedScheduler":
        """The same guidance around another scheduler, which shares its settings: a change of one's is one of the other's."""
        guided = GuidedScheduler(scheduler, self.experts, self.target, rescale_to_mean=self.rescale_to_mean)
        guided.guidance = self.guidance
        return guided

    def _guidances(self) -> list[Guidance]:
        """Its own guidance, and then that of each guided scheduler inside."""
        inner = self.scheduler._guidances() if isinstance(self.scheduler, GuidedScheduler) else []
        return [self.guidance, *inner]

    def _guided_step(
        self, step: Callable, model_output: torch.Tensor, timestep, sample: torch.Tensor, *args, **kwargs
    ):
        """A step of the scheduler with guidance, where `step` is the one without."""
        position = self._position(timestep)
        guidances = [guidance for guidance in self._guidances() if self._is_guided(position, guidance)]
        if not guidances:
            result = step(model_output, timestep, sample, *args, **kwargs)
        elif self.guides_mean:
            call = inspect.signature(step).bind(model_output, int(self.timesteps[position]), sample, *args, **kwargs)
            noisy = self._noisy_step(position, model_output, sample)
            result = step_with_guided_mean(self, step, call, noisy, guidances)
        else:
            noisy = self._noisy_step(position, model_output, sample)
            guided = guided_prediction(self, noisy, model_output, guidances)
            with unclipped(self):
                result = step(guided, timestep, sample, *args, **kwargs)
        if position == len(self.timesteps) - 1:
            for guidance in self._guidances():
                guidance.raise_if_nonfinite()
        return result

    def _position(self, timestep) -> int:
        """The index in `timesteps` of the step that is taken."""
        step_index = getattr(self, "step_index", None)
        if step_index is not None:
            return step_index  # a second-order scheduler has each timestep twice
        matches = (self.timesteps == torch.as_tensor(timestep).cpu()).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Expected `timestep` to be one of {self.timesteps.tolist()}, but got {timestep}.")
        return int(matches[0])

    def _is_guided(self, position: int, guidance: Guidance) -> bool:
        """Whether guidance applies. Of a second-order scheduler's step both evaluations are guided, or neither."""
        step = position // self.order
        first_step = (getattr(self, "begin_index", None) or 0) // self.order
        applies = guidance.applies(self.timesteps[step * self.order], step - first_step)
        return applies and self._level(position)[0].item() > MIN_ALPHA

    def _level(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of x_t, on the CPU."""
        if self._noise_levels is None:
            self._noise_levels = noise_levels(self)
        alphas, sigmas = self._noise_levels
        return alphas[position], sigmas[position]

    def _noisy_step(self, position: int, model_output: torch.Tensor, sample: torch.Tensor) -> NoisyStep:
        """The input of a step as guidance needs it."""
        timestep = self.timesteps[position]
        alpha, sigma = self._level(position)
        x_t = self.scale_model_input(sample, timestep).float()
        prediction = model_output[:, : sample.shape[1]].float()
        return NoisyStep(timestep, x_t, prediction, self.config.prediction_type, alpha, sigma)


@functools.cache
def _guided_class(base: Any, scheduler_class: Any) -> type:
    """
    Derive a class from [`GuidedScheduler`] and from a scheduler's class.

    It has the name and module of the scheduler's class, because Diffusers saves schedulers under these, and they are saved
    without guidance.
    """

    class Guided(base, scheduler_class):  # type: ignore[valid-type, misc]
        unguided_class = scheduler_class
        __doc__ = scheduler_class.__doc__
        __module__ = scheduler_class.__module__

        @functools.wraps(scheduler_class.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            # The timesteps stay on the CPU, so that no step waits for an accelerator to know which one it is.
            call = inspect.signature(super().set_timesteps).bind(*args, **kwargs)
            call.arguments["device"] = "cpu"
            super().set_timesteps(*call.args, **call.kwargs)
            self._noise_levels = None
            for guidance in self._guidances():
                guidance.reset()

        @functools.wraps(scheduler_class.step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            return self._guided_step(super().step, model_output, timestep, sample, *args, **kwargs)

    Guided.__name__ = scheduler_class.__name__
    Guided.__qualname__ = f"{base.__name__}[{scheduler_class.__name__}]"
    return Guided


def _new_instance(base: Any, scheduler_class: Any) -> GuidedScheduler:
    """A guided scheduler without attributes, which are set afterwards."""
    return object.__new__(_guided_class(base, scheduler_class))


def _warn_of_other_levels(experts: GuidanceExperts, scheduler: Any) -> None:
    """Warn of experts that would see another noise at a timestep than they were trained on."""
    trained = experts.config.get("noise_schedule")
    if trained is None:
        return
    levels = DDPMScheduler(**trained).alphas_cumprod
    if (
        scheduler.config.get("model_train_timesteps") is not None
    ):  # it has only the first of them: see `without_pure_noise`
        levels = levels[: len(scheduler.alphas_cumprod)]
    if not are_same_levels(levels, scheduler.alphas_cumprod):
        t = len(levels) // 2
        warnings.warn(
            f"The guidance experts were trained at other noise levels than the scheduler's: ᾱ at timestep {t} is "
            f"{levels[t]:.3g}, not {scheduler.alphas_cumprod[t]:.3g}. They guide worse; train them with the beta_schedule "
            f"of the pipeline.",
            stacklevel=4,
        )
