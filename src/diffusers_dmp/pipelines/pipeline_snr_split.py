"""Several denoisers, each for its own stretch of signal-to-noise ratios (SNR = ᾱ/(1-ᾱ)).
https://arxiv.org/abs/2207.04316

Legend: B batch, C channels, H and W height and width, N denoisers, S denoising steps.
"""

import inspect
import math
import warnings
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.predictions import expected_prediction_type
from ..intervals import NoiseIntervals
from ..models.inputs import class_count
from ..plugins.attachment import patch_of
from ..saving.mixins import listed
from ..saving.naming import PACKAGE
from .denoising import DenoisingMixin

MAX_DENOISERS = 32  # Diffusers reads from the constructor's signature which components there may be
DENOISER_NAMES = tuple(f"denoiser_{index}" for index in range(MAX_DENOISERS))


class SNRSplitPipeline(DenoisingMixin, DiffusionPipeline):
    """
    Generate images with N denoisers in turn, from the one for the lowest signal-to-noise ratios to that for the highest.

    Each is saved in a folder of its own, `denoiser_0` (the cleanest images'), `denoiser_1`, …; with
    `enable_model_cpu_offload` only the one at work is on the accelerator.

    Args:
        denoisers (`list[ModelMixin]`): The cleanest images' first; of any classes that [`ClassConditionalPipeline`] takes,
            with the same (latent) channels, size and classes.
        scheduler ([`SchedulerMixin`]): With an SNR for each timestep; see [`NoiseIntervals.from_snr`].
        snr_boundaries (`list[float]` of length N - 1): Descending. Denoiser i owns s_i >= SNR > s_{i+1}, with s_0 = ∞ and
            s_N = 0. Here and below a `dict` by index will do, as it is saved.
        vae ([`AutoencoderKL`], *optional*): For denoisers of latents.
        prediction_types (`list[str]` of length N, *optional*): 'epsilon', 'sample' or 'v_prediction' each; by default what
            the denoiser's configuration says, or else the scheduler's.
        guidance_scales (`list[float]` of length N, *optional*): w of classifier-free guidance, by default 1 for each.
        id2label (`dict[str, str]`, *optional*): The names of the classes by index.

    Raises:
        ValueError: if the numbers of denoisers and intervals differ, boundaries are not positive or do not descend, a
            denoiser was trained for another interval or prediction type, or the denoisers' channels, sizes or classes
            differ.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _optional_components = ["scheduler", "vae", *DENOISER_NAMES]  # as Diffusers calls those with a default

    def __init__(
        self,
        denoisers: list[ModelMixin] | None = None,
        scheduler: SchedulerMixin | None = None,
        snr_boundaries: "list[float] | dict[str, float] | None" = None,
        vae: AutoencoderKL | None = None,
        prediction_types: "list[str] | dict[str, str] | None" = None,
        guidance_scales: "list[float] | dict[str, float] | None" = None,
        id2label: dict[str, str] | None = None,
        **named_denoisers: ModelMixin | None,
    ):
        super().__init__()
        snr_boundaries, prediction_types, guidance_scales = map(
            listed, (snr_boundaries, prediction_types, guidance_scales)
        )
        if denoisers is None:  # as they come from a folder
            denoisers = [named_denoisers[name] for name in DENOISER_NAMES if named_denoisers.get(name) is not None]
        if not 1 <= len(denoisers) <= MAX_DENOISERS:
            raise ValueError(f"Expected 1 to {MAX_DENOISERS} `denoisers`, but got {len(denoisers)}.")
        self.register_modules(scheduler=scheduler, vae=vae, **dict(zip(DENOISER_NAMES, denoisers)))
        self.num_denoisers = len(denoisers)
        self.model_cpu_offload_seq = "->".join([*DENOISER_NAMES[: len(denoisers)][::-1], "vae"])
        own_types = [denoiser.config.get("prediction_type") for denoiser in denoisers]
        if prediction_types is None:
            prediction_types = [own or expected_prediction_type(scheduler) for own in own_types]
        guidance_scales = [1.0] * len(denoisers) if guidance_scales is None else [float(w) for w in guidance_scales]
        self.register_to_config(
            snr_boundaries=[float(boundary) for boundary in snr_boundaries or []],
            prediction_types=list(prediction_types),
            guidance_scales=guidance_scales,
        )
        self._set_up_images(vae, id2label)
        self.intervals()  # whether the boundaries fit
        _check_denoisers(denoisers, self.config)

    @classmethod
    def from_pipelines(
        cls, pipelines: "list[DiffusionPipeline]", snr_boundaries: list[float], **kwargs
    ) -> "SNRSplitPipeline":
        """
        Put the denoisers of several pipelines together; scheduler, VAE and class names are the first one's.

        Args:
            pipelines (`list[DiffusionPipeline]`): The cleanest images' first; with a `transformer` or `unet` each.
            snr_boundaries (`list[float]`): See [`SNRSplitPipeline`].
            kwargs: Its other arguments.

        Raises:
            ValueError: if one has no denoiser, or their noise schedules differ.
        """
        denoisers = [getattr(each, "transformer", None) or getattr(each, "unet", None) for each in pipelines]
        for pipeline, denoiser in zip(pipelines, denoisers):
            if denoiser is None:
                raise ValueError(
                    f"Expected each of `pipelines` to have a `transformer` or `unet`, but got a {type(pipeline).__name__}."
                )
        first = pipelines[0]
        schedules = [getattr(pipeline.scheduler, "alphas_cumprod", None) for pipeline in pipelines]
        for pipeline, schedule in zip(pipelines, schedules):
            same_kind = (schedule is None) == (schedules[0] is None)
            if not same_kind or (schedule is not None and not torch.equal(schedule, schedules[0])):
                raise ValueError(
                    "Expected `pipelines` to have one noise schedule, but got different ones in "
                    f"{type(first.scheduler).__name__} and {type(pipeline.scheduler).__name__}."
                )
        defaults = {
            "vae": getattr(first, "vae", None),
            "id2label": first.config.get("id2label"),
            "prediction_types": [
                denoiser.config.get("prediction_type") or expected_prediction_type(pipeline.scheduler)
                for pipeline, denoiser in zip(pipelines, denoisers)
            ],
        }
        return cls(denoisers, first.scheduler, snr_boundaries, **defaults | kwargs)

    @property
    def denoisers(self) -> list[ModelMixin]:
        """The cleanest images' first."""
        return [getattr(self, name) for name in DENOISER_NAMES[: self.num_denoisers]]

    @property
    def components(self) -> dict:
        """Those that there are."""
        names = ("scheduler", "vae", *DENOISER_NAMES[: self.num_denoisers])
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """
        See [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if a denoiser has a patch, which would be lost.
        """
        for index, denoiser in enumerate(self.denoisers):
            if patch_of(denoiser) is not None:
                raise ValueError(
                    f"Expected denoisers without patches, for which this pipeline has no folder, but got one on denoiser "
                    f"{index}; save it by itself, and `detach()` it."
                )
        super().save_pretrained(save_directory, **kwargs)

    def intervals(self, snr_boundaries: list[float] | None = None) -> NoiseIntervals:
        """
        Which denoiser owns which timesteps.

        Raises:
            ValueError: if the boundaries do not fit the denoisers or the scheduler.
        """
        boundaries = self.config.snr_boundaries if snr_boundaries is None else snr_boundaries
        if len(boundaries) + 1 != self.num_denoisers:
            raise ValueError(
                f"Expected as many denoisers as `snr_boundaries` make intervals, {len(boundaries) + 1}, "
                f"but got {self.num_denoisers}."
            )
        return NoiseIntervals.from_snr(boundaries, self.scheduler)

    def steps_per_denoiser(
        self,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        snr_boundaries: list[float] | None = None,
    ) -> list[int]:
        """
        How often each denoiser is called; arguments as the call's. A second-order scheduler calls twice for a step.
        """
        self._prepare_timesteps(self.scheduler, num_inference_steps, timesteps, "cpu")
        owners = self._owners(self.scheduler, snr_boundaries)
        return [owners.count(index) for index in range(self.num_denoisers)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: "int | str | list[int] | list[str] | torch.LongTensor | None" = None,
        batch_size: int = 1,
        guidance_scale: "float | list[float] | None" = None,
        guidance_channels: int | None = None,
        snr_boundaries: list[float] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: "torch.Generator | list[torch.Generator] | None" = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: "Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None" = None,
        callback_on_step_end_tensor_inputs: "list[str]" = ["latents"],  # noqa: B006  Diffusers' own default
    ) -> "ImagePipelineOutput | tuple":
        """
        As [`ClassConditionalPipeline.__call__`], but for

        Args:
            guidance_scale (`float` or list of N `float`, *optional*): One for all denoisers or one for each; the
                configuration's `guidance_scales` by default. Guiding x0 or v is guiding ε: each is linear in the others.
            snr_boundaries (`list[float]` of length N - 1, *optional*): Instead of the configuration's.

        Warns:
            if a denoiser gets none of the steps, or with these boundaries noise that it was not trained on.
        """
        scales = self.config.guidance_scales if guidance_scale is None else guidance_scale
        scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * self.num_denoisers
        if len(scales) != self.num_denoisers:
            raise ValueError(
                f"Expected `guidance_scale` to be a number or {self.num_denoisers} of them, but got {len(scales)}."
            )

        def owners_of_steps(scheduler: SchedulerMixin) -> list[int]:
            owners = self._owners(scheduler, snr_boundaries)
            for index in sorted(set(range(self.num_denoisers)) - set(owners)):
                _warn(f"Denoiser {index} has none of the {len(owners)} steps.")
            return owners

        if snr_boundaries is not None:
            for problem in _foreign_intervals(self.denoisers, snr_boundaries):
                _warn(problem)
        return self._generate(
            self.config.prediction_types,
            scales,
            owners_of_steps,
            class_labels=class_labels,
            batch_size=batch_size,
            guidance_channels=guidance_channels,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            height=height,
            width=width,
            eta=eta,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def _owners(self, scheduler: SchedulerMixin, snr_boundaries: list[float] | None) -> list[int]:
        """The denoiser of each step, read once."""
        timesteps = scheduler.timesteps.cpu()
        # all evaluations within one step of a second-order scheduler are made by the denoiser that begins it
        begins = torch.arange(len(timesteps)) // scheduler.order * scheduler.order
        runge_kutta = len(getattr(scheduler, "prk_timesteps", ()))  # of PNDM's first steps, four each
        begins[:runge_kutta] = torch.arange(runge_kutta) // 4 * 4
        return self.intervals(snr_boundaries).index(timesteps[begins]).tolist()


def _name_denoisers() -> None:
    """
    Diffusers reads which components a pipeline's folder may have from its constructor's signature, where `**` stands for
    none; so it is given one that names them.
    """
    signature = inspect.signature(SNRSplitPipeline.__init__)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in DENOISER_NAMES]
    SNRSplitPipeline.__init__.__signature__ = signature.replace(parameters=parameters + named)


_name_denoisers()


def _warn(message: str) -> None:
    """At the line that called the pipeline."""
    warnings.warn(message, stacklevel=4)


def _foreign_intervals(denoisers: list[ModelMixin], snr_boundaries: list[float]) -> list[str]:
    """What is to be said of denoisers that are given noise which they were not trained on."""
    problems = []
    bounds = [math.inf, *snr_boundaries, 0.0]
    for index, (denoiser, highest, lowest) in enumerate(zip(denoisers, bounds, bounds[1:])):
        trained = denoiser.config.get("snr_interval") or (None, None)
        trained_highest = math.inf if trained[0] is None else trained[0]
        trained_lowest = 0.0 if trained[1] is None else trained[1]
        if highest > trained_highest or lowest < trained_lowest:
            problems.append(
                f"Expected denoiser {index} to have been trained on the signal-to-noise ratios {highest} to {lowest}, "
                f"but got one for {trained_highest} to {trained_lowest}."
            )
    return problems


def _check_denoisers(denoisers: list[ModelMixin], config) -> None:
    for name in ("prediction_types", "guidance_scales"):
        if len(config[name]) != len(denoisers):
            raise ValueError(
                f"Expected `{name}` to be one for each of {len(denoisers)} denoisers, but got {config[name]}."
            )
    for problem in _foreign_intervals(denoisers, config.snr_boundaries):
        raise ValueError(problem)
    for index, (denoiser, own_type) in enumerate(zip(denoisers, config.prediction_types)):
        own = denoiser.config
        if own.get("prediction_type") not in (None, own_type):
            raise ValueError(
                f"Expected denoiser {index} to be given the prediction type {own.prediction_type!r} that it was trained "
                f"for, but got {own_type!r}."
            )
        for name in ("in_channels", "sample_size"):
            if own[name] != denoisers[0].config[name]:
                raise ValueError(
                    f"Expected all denoisers to have the `{name}` {denoisers[0].config[name]} of the first, "
                    f"but got {own[name]} for denoiser {index}."
                )
        if class_count(denoiser.config) != class_count(denoisers[0].config):
            raise ValueError(
                f"Expected all denoisers to know the {class_count(denoisers[0].config)} classes of the first, "
                f"but got {class_count(denoiser.config)} for denoiser {index}."
            )
