"""Guidance by a vision network for any pipeline: in the scheduler, which sees x_t, t and the denoiser's prediction.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233, algorithms 1 and 2

Legend: B batch, T training timesteps, S steps; the other dimensions of a sample are its own.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.noise import is_flow_matching
from ..diffusion.predictions import (
    FLOW_PREDICTION,
    PREDICTION_TYPES,
    check_noise_levels,
    expected_prediction_type,
    noise_levels,
)
from ..diffusion.timesteps import counts_from_noise, training_timesteps
from .decoders import LatentDecoder
from .experts import GuidanceExperts
from .gradient import Guidance, NoisyStep, check_setting
from .pipeline_decoders import decoder_of
from .steps import guided_prediction, step_with_guided_mean, unclipped
from .targets import GuidanceTarget

# With a smaller α, x_t has no image to guide: at ᾱ = 0, or the 2⁻²⁴ that some schedulers replace it by.
MIN_ALPHA = 1e-3
# In flow matching, ∇log p is multiplied by σ/(1-σ), and a gradient that does not vanish where there is nothing but noise diverges.
MAX_FLOW_SIGMA = 0.95
_OWN_ATTRIBUTES = ("scheduler", "guidance", "_schedule")


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
    ε - √(1-ᾱ)·s·∇log p, where ε is that of the clipped x̂0 if the scheduler clips, as in the published code. With flow matching
    that is the velocity v - s·σ/(1-σ)·∇log p. A guided scheduler around another guided one asks for both things at once.

    The experts need not be trained on the scheduler's noise: a step is guided by the expert that knows its signal-to-noise
    ratio, which sees x_t scaled to the noise that it was trained on (see [`NoiseProcess`]).

    Args:
        scheduler ([`SchedulerMixin`]): Any scheduler of Diffusers that has `alphas_cumprod`, or a flow-matching one.
        experts ([`GuidanceExperts`]): The network that guides. It is moved to the samples' device, and put in float32 and eval
            mode.
        target ([`GuidanceTarget`]): What to ask for.
        scale (`float`): The guidance scale s.
        rescale_to_mean (`bool`): Rescale ∇log p to the norm of the mean, for each sample, as in the paper's text-to-image
            experiments (DDPM schedulers only).
        timestep_range (`tuple[float, float]`, *optional*): Guide only the training timesteps low <= t < high, where t = σ·T for
            flow matching. By default all of them, and for flow matching those below 0.95·T: above, the gradient would be
            multiplied by more than 19.
        every (`int`): Guide every n-th step, beginning with the first one.
        decoder (*optional*): For latents: x̂0 is decoded, and the experts see the decoded images. A [`LatentDecoder`]
            or any function of latents (B, …) that returns images (B, 3, H, W) or videos (B, f, 3, H, W) in [-1, 1].
        vae ([`AutoencoderKL`], *optional*): Short for `decoder=LatentDecoder(vae)`.
        on_nonfinite (`str`): What to do where guidance is infinite or not a number in the samples' dtype. Such samples are not
            guided in that step. With 'unguided' that is all; with 'raise' a `FloatingPointError` is raised at the last of the
            timesteps (and not if a pipeline stops before it), so that no step waits for an accelerator.

    Raises:
        ValueError: if the scheduler's noise levels are not known, the experts do not know theirs and cannot be matched, an
            argument is out of range, or the target does not fit the experts' network.
    """

    unguided_class: "ClassVar[type[SchedulerMixin] | None]" = None

    scheduler: SchedulerMixin
    guidance: Guidance
    experts = _setting("experts")
    scale = _setting("scale")
    rescale_to_mean = _setting("rescale_to_mean")
    timestep_range = _setting("timestep_range")
    every = _setting("every")
    decoder = _setting("decoder")
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
        decoder: "Callable[[torch.Tensor], torch.Tensor] | None" = None,
        vae: Any = None,
        on_nonfinite: str = "raise",
    ):
        check_noise_levels(scheduler)
        _check_process(experts, scheduler)
        kind = expected_prediction_type(scheduler)
        known = (FLOW_PREDICTION,) if is_flow_matching(scheduler) else PREDICTION_TYPES
        if kind not in known:
            raise ValueError(
                f"Expected the `prediction_type` of a {type(scheduler).__name__} to be one of {', '.join(known)}, but got {kind!r}."
            )
        if rescale_to_mean and not self.guides_mean:
            raise ValueError(
                f"Expected a DDPMScheduler for `rescale_to_mean`, but got a {type(scheduler).__name__}, which has no mean."
            )
        state = {name: value for name, value in scheduler.__dict__.items() if name not in _OWN_ATTRIBUTES}
        self.__dict__.update(copy.deepcopy(state))
        self.scheduler = scheduler
        decoder = LatentDecoder(vae) if vae is not None else decoder
        self.guidance = Guidance(
            experts, target, scale, rescale_to_mean, timestep_range, every, decoder=decoder, on_nonfinite=on_nonfinite
        )
        self._schedule: _Schedule | None = None

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
    def for_pipeline(
        cls,
        pipeline: Any,
        experts: GuidanceExperts,
        target: GuidanceTarget,
        scale: float = 7.5,
        *,
        frames: "list[int] | None" = None,
        **settings: Any,
    ) -> "GuidedScheduler":
        """
        Guide the scheduler of a pipeline by the images that its latents are decoded to.

        If it is guided already, this guidance is added; `pipe.scheduler.target = …` asks for something else instead.

        ```py
        pipe.scheduler = GuidedScheduler.for_pipeline(pipe, experts, ClassTarget("zebra"), scale=7.5)
        ```

        Args:
            pipeline ([`DiffusionPipeline`]): The pipeline; without a VAE, the experts see its noisy images.
            experts, target, scale: See [`GuidedScheduler`].
            frames (`list[int]`, *optional*): Which frames of a video guide; see [`VideoDecoder`].
            settings: Further arguments of [`GuidedScheduler`]. `decoder` replaces the one of the pipeline (see [`decoder_of`]), and
                `vae` the VAE in it.

        Raises:
            ValueError: as [`GuidedScheduler`] and [`decoder_of`].
        """
        of_decoder = {"frames": frames, "vae": settings.pop("vae", None)}
        of_decoder = {name: value for name, value in of_decoder.items() if value is not None}
        if settings.get("decoder") is None:
            settings["decoder"] = decoder_of(pipeline, **of_decoder)
        elif of_decoder:
            raise ValueError(
                f"Expected no `{next(iter(of_decoder))}` beside a `decoder`, which has its own, but got both."
            )
        return cls(pipeline.scheduler, experts, target, scale, **settings)

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
        if kwargs.get("per_token_timesteps") is not None:
            raise ValueError("Expected one timestep for the whole of a sample, but got `per_token_timesteps`.")
        position = self._position(timestep)
        guidances = [guidance for guidance in self._guidances() if self._is_guided(position, guidance)]
        if not guidances:
            result = step(model_output, timestep, sample, *args, **kwargs)
        elif self.guides_mean:
            call = inspect.signature(step).bind(model_output, int(self.timesteps[position]), sample, *args, **kwargs)
            noisy = self._noisy_step(position, model_output, sample)
            result = step_with_guided_mean(self, step, call, noisy, guidances)
        else:
            prediction = self._signed(model_output)
            noisy = self._noisy_step(position, prediction, sample)
            guided = self._signed(guided_prediction(self, noisy, prediction, guidances))
            with unclipped(self):
                result = step(guided, timestep, sample, *args, **kwargs)
        if position == len(self.timesteps) - 1:
            for guidance in self._guidances():
                guidance.raise_if_nonfinite()
        return result

    def _steps(self) -> "_Schedule":
        """The timesteps and noise levels of all steps."""
        if self._schedule is None:
            self._schedule = _Schedule.of(self)
        return self._schedule

    def _position(self, timestep) -> int:
        """The index in `timesteps` of the step that is taken."""
        for name in ("step_index", "begin_index"):  # a second-order scheduler has each timestep twice
            index = getattr(self, name, None)
            if index is not None:
                return index
        timesteps = self._steps().timesteps
        matches = (timesteps == torch.as_tensor(timestep).cpu()).nonzero()
        if len(matches) == 0:
            raise ValueError(f"Expected `timestep` to be one of {timesteps.tolist()}, but got {timestep}.")
        return int(matches[0])

    def _is_guided(self, position: int, guidance: Guidance) -> bool:
        """Whether guidance applies. Of a second-order scheduler's step both evaluations are guided, or neither."""
        step = position // self.order
        first_step = (getattr(self, "begin_index", None) or 0) // self.order
        schedule = self._steps()
        applies = guidance.applies(
            schedule.training_timesteps[step * self.order], step - first_step, schedule.default_range
        )
        return applies and schedule.alphas[position].item() > MIN_ALPHA

    def _signed(self, prediction: torch.Tensor) -> torch.Tensor:
        """The velocity ε - x0 of one that Mochi's scheduler takes, x0 - ε, and the other way round."""
        return -prediction if is_flow_matching(self) and counts_from_noise(self) else prediction

    def _noisy_step(self, position: int, model_output: torch.Tensor, sample: torch.Tensor) -> NoisyStep:
        """The input of a step as guidance needs it."""
        schedule = self._steps()
        is_flow = is_flow_matching(self)
        x_t = sample if is_flow else self.scale_model_input(sample, schedule.timesteps[position])
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        prediction = model_output[:, : sample.shape[1]].to(x_t.dtype)
        return NoisyStep(
            scheduler=self,
            timestep=schedule.training_timesteps[position],
            x_t=x_t,
            prediction=prediction,
            prediction_type=expected_prediction_type(self),
            alpha=schedule.alphas[position],
            sigma=schedule.sigmas[position],
        )


@dataclass(frozen=True, eq=False)
class _Schedule:
    """
    Timesteps and noise levels of all steps, on the CPU, so that no step waits for an accelerator.

    Args:
        timesteps (`torch.Tensor` of shape (S,)): Those of the scheduler.
        training_timesteps (`torch.Tensor` of shape (S,)): The same, counted as in training.
        alphas, sigmas (`torch.Tensor` of shape (S,)): α and σ; see [`noise_levels`].
        default_range (`tuple[float, float]`): The training timesteps that are guided if nothing else is asked for.
    """

    timesteps: torch.Tensor
    training_timesteps: torch.Tensor
    alphas: torch.Tensor
    sigmas: torch.Tensor
    default_range: tuple[float, float]

    @classmethod
    def of(cls, scheduler: "GuidedScheduler") -> "_Schedule":
        """Those of a scheduler whose timesteps are set."""
        alphas, sigmas = noise_levels(scheduler)
        timesteps, config = scheduler.timesteps.cpu(), scheduler.config
        if not is_flow_matching(scheduler):
            count = config.get("model_train_timesteps") or config["num_train_timesteps"]
            trained = training_timesteps(scheduler, count)
            return cls(timesteps, trained, alphas, sigmas, default_range=(0.0, float("inf")))
        count = config["num_train_timesteps"]
        if count == 1:  # some count from 0 to 1
            count = scheduler.experts.intervals.num_train_timesteps
        # t = σ·T: the scheduler's own timesteps may be rounded
        return cls(timesteps, sigmas * count, alphas, sigmas, default_range=(0.0, MAX_FLOW_SIGMA * count))


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
            # The timesteps are made on the CPU, so that no step waits for an accelerator to know which one it is.
            call = inspect.signature(super().set_timesteps).bind(*args, **kwargs)
            device, call.arguments["device"] = call.arguments.get("device"), "cpu"
            super().set_timesteps(*call.args, **call.kwargs)
            self._schedule = _Schedule.of(self)
            if hasattr(self, "step_index"):  # which counts the steps; the others look at `timesteps` at each of them
                self.timesteps = self.timesteps.to(device)
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


def _check_process(experts: GuidanceExperts, scheduler: Any) -> None:
    """Refuse experts whose noise is not known, where it matters."""
    if experts.process is not None:
        return
    if is_flow_matching(scheduler) and experts.config.num_experts > 1:
        raise ValueError(
            f"Expected experts that know which noise they were trained on, for a {type(scheduler).__name__}, but got "
            f"{experts.config.num_experts} without `noise_schedule`. For diffusion it has the arguments of the DDPMScheduler of their "
            "training, for flow matching it is {'process': 'flow_matching'}."
        )
    experts.intervals.check_scheduler(scheduler)
