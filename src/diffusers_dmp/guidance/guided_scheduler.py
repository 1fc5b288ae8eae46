"""Guidance by a vision network for any pipeline: in the scheduler, which sees x_t, t and the denoiser's prediction.
https://arxiv.org/abs/2212.05973, after https://arxiv.org/abs/2105.05233, algorithms 1 and 2

How a step is guided: guided_class.py, which needs the noise levels of step_schedule.py, the gradient of gradient.py and the two
formulas of steps.py.

Legend: B batch, T training timesteps; the other dimensions of a sample are its own.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .decoders import LatentDecoder
from .experts import GuidanceExperts
from .gradient import Guidance, check_setting
from .guided_class import GuidedStepsMixin, guided_class
from .pipeline_decoders import decoder_of
from .scheduler_checks import check_process, check_scheduler_for_guidance
from .targets import GuidanceTarget

_OWN_ATTRIBUTES = ("scheduler", "guidance", "_schedule", "_first_position")


def _setting(name: str) -> property:
    """An attribute that a guided scheduler has from its own guidance."""

    def get(self: "GuidedScheduler") -> Any:
        return getattr(self.guidance, name)

    def change(self: "GuidedScheduler", value: Any) -> None:
        check_setting(name, value)
        if name == "rescale_to_mean":
            self._check_mean(value)
        setattr(self.guidance, name, value)

    return property(get, change)


class GuidedScheduler(GuidedStepsMixin):
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

    Warns:
        If experts of noisy images are given a decoder; and when a run ends in which no step was guided.
    """

    unguided_class: "ClassVar[type[SchedulerMixin] | None]" = None

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
        check_scheduler_for_guidance(scheduler)
        check_process(experts, scheduler)
        self._check_mean(rescale_to_mean)
        if decoder is not None and vae is not None:
            raise ValueError(
                "Expected `decoder` or `vae`, which is short for `decoder=LatentDecoder(vae)`, but got both."
            )
        state = {name: value for name, value in scheduler.__dict__.items() if name not in _OWN_ATTRIBUTES}
        self.__dict__.update(copy.deepcopy(state))
        self.scheduler = scheduler
        decoder = decoder if vae is None else LatentDecoder(vae)
        if decoder is not None and experts.process is not None:
            warnings.warn(
                "The guidance experts were trained on noisy images, but with a decoder they see clean ones, which they know less "
                "well than the network that they were made of: `GuidanceExperts.from_base(…, num_experts=1)`.",
                stacklevel=2,
            )
        self.guidance = Guidance(
            experts, target, scale, rescale_to_mean, timestep_range, every, decoder=decoder, on_nonfinite=on_nonfinite
        )
        self._schedule, self._first_position = None, None

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
    def experts(self) -> GuidanceExperts:
        """The network that guides."""
        return self.guidance.experts

    @experts.setter
    def experts(self, experts: GuidanceExperts) -> None:
        check_process(experts, self)
        self.guidance.set_experts(experts)
        self._schedule = None  # a scheduler that counts from 0 to 1 counts the timesteps of its experts

    @property
    def target(self) -> GuidanceTarget:
        """What is asked for: a copy of what was given, with its classes looked up in the network of the experts."""
        return self.guidance.target

    @target.setter
    def target(self, target: GuidanceTarget) -> None:
        self.guidance.set_target(target)

    def _check_mean(self, rescale_to_mean: bool) -> None:
        """Refuse to rescale gradients to a mean that there is not."""
        if rescale_to_mean and not self.guides_mean:
            raise ValueError(
                f"Expected a DDPMScheduler for `rescale_to_mean`, but got a {type(self).__name__}, which has no mean."
            )

    def around(self, scheduler: SchedulerMixin) -> "GuidedScheduler":
        """The same guidance around another scheduler, which shares its settings: a change of one's is one of the other's."""
        guided = GuidedScheduler(scheduler, self.experts, self.target, rescale_to_mean=self.rescale_to_mean)
        guided.guidance = self.guidance
        return guided


def _new_instance(base: Any, scheduler_class: Any) -> GuidedScheduler:
    """A guided scheduler without attributes, which are set afterwards."""
    return object.__new__(guided_class(base, scheduler_class))
