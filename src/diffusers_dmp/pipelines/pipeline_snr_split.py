"""Generate images with several denoisers in turn, each for its own interval of signal-to-noise ratios (SNR = ᾱ/(1-ᾱ)).

Patch Diffusion: https://arxiv.org/abs/2207.04316.
Legend: B batch, C channels, H and W height and width, N denoisers.
"""

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.predictions import prediction_type_of
from ..intervals import NoiseIntervals
from ..plugins.attachment import patch_of
from ..saving.adapters import check_component
from ..saving.mixins import listed
from ..saving.naming import PACKAGE, descends_from
from .denoiser_checks import check_denoisers, untrained_intervals
from .denoising import DenoisingMixin
from .scheduling import owners_of_steps, set_timesteps, with_trained_noise
from .settings import DenoiserSettings, GenerationSettings, checked_steps
from .trained_noise import have_same_noise, trained_noise_of, trained_scheduler_of

MAX_DENOISERS = 32
DENOISER_NAMES = tuple(f"denoiser_{index}" for index in range(MAX_DENOISERS))


def _with_denoiser_names(init: Any) -> Any:
    """
    Replace `**denoisers_by_name` in a constructor's signature by the names in `DENOISER_NAMES`.

    From this signature Diffusers reads which components a saved pipeline may have; it ignores `**`.
    """
    signature = inspect.signature(init)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in DENOISER_NAMES]
    init.__signature__ = signature.replace(parameters=parameters)
    return init


class SNRSplitPipeline(DenoisingMixin, DiffusionPipeline):
    """
    Generate images with N denoisers in turn, from the one for the lowest signal-to-noise ratios to that for the highest.

    Each denoiser is saved in its own folder, `denoiser_0` (for the highest ratios, the least noise), `denoiser_1`, …; with
    `enable_model_cpu_offload` only the denoiser that is working is on the accelerator.

    Args:
        denoisers (`list[ModelMixin]`): The denoiser for the least noise first; of any classes that
            [`ClassConditionalPipeline`] takes, with the same (latent) channels, size and classes.
        scheduler ([`SchedulerMixin`]): A scheduler with an SNR for each timestep; see [`NoiseIntervals.from_snr`].
        snr_boundaries (`list[float]` of length N - 1): Descending. Denoiser i owns s_i >= SNR > s_{i+1}, with s_0 = ∞ and
            s_N = 0. This argument, `prediction_types` and `guidance_scales` may also be a `dict` by index, as they are
            saved.
        vae ([`AutoencoderKL`], *optional*): For denoisers of latents.
        prediction_types (`list[str]` of length N, *optional*): 'epsilon', 'sample' or 'v_prediction' each; by default what
            the denoiser's configuration says, or else `noise_schedule`.
        guidance_scales (`list[float]` of length N, *optional*): w of classifier-free guidance, by default 1 for each.
        id2label (`dict[str, str]`, *optional*): The names of the classes, by index.
        noise_schedule (`dict`, *optional*): The noise that the denoisers were trained with, whatever the scheduler, as
            [`noise_schedule_of`] returns it; by default that of the scheduler. It is saved with the pipeline.
        denoisers_by_name ([`ModelMixin`]): `denoiser_0`, `denoiser_1`, … instead of `denoisers`, as they are saved.

    Raises:
        ValueError: if there is no scheduler, `denoisers` are given in both ways, or one is wrapped by PEFT; the numbers of
            denoisers and intervals differ, boundaries are not positive or do not descend, a
            denoiser was trained for another interval or prediction type, or the denoisers' channels, sizes or classes
            differ.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    _optional_components = ["scheduler", "vae", *DENOISER_NAMES]  # all that have a default

    @_with_denoiser_names
    def __init__(
        self,
        denoisers: list[ModelMixin] | None = None,
        scheduler: SchedulerMixin | None = None,
        snr_boundaries: list[float] | dict[str, float] | None = None,
        vae: AutoencoderKL | None = None,
        prediction_types: list[str] | dict[str, str] | None = None,
        guidance_scales: list[float] | dict[str, float] | None = None,
        id2label: dict[str, str] | None = None,
        noise_schedule: dict[str, Any] | None = None,
        **denoisers_by_name: ModelMixin | None,
    ):
        super().__init__()
        unknown = sorted(denoisers_by_name.keys() - set(DENOISER_NAMES))
        if unknown:
            raise TypeError(f"Expected `denoiser_0` to `{DENOISER_NAMES[-1]}`, but got the arguments {unknown}.")
        names = [name for name in DENOISER_NAMES if denoisers_by_name.get(name) is not None]
        by_name = [denoisers_by_name[name] for name in names]
        if denoisers is not None and by_name:
            raise ValueError("Expected `denoisers`, or `denoiser_0`, `denoiser_1`, … by name, but got both.")
        denoisers = by_name if denoisers is None else denoisers
        if not 1 <= len(denoisers) <= MAX_DENOISERS:
            raise ValueError(f"Expected 1 to {MAX_DENOISERS} `denoisers`, but got {len(denoisers)}.")
        if scheduler is None:
            raise ValueError("Expected a `scheduler`, whose signal-to-noise ratios choose the denoiser, but got None.")
        expected = len(listed(snr_boundaries) or []) + 1
        if names and len(names) != expected:
            raise ValueError(
                f"Expected as many denoisers as `snr_boundaries` make intervals, {expected}, but got {len(names)}: "
                f"{', '.join(f'`{name}`' for name in names)}."
            )
        for name, denoiser in zip(DENOISER_NAMES, denoisers):
            check_component(name, denoiser)
        self.register_modules(scheduler=scheduler, vae=vae, **dict(zip(DENOISER_NAMES, denoisers)))
        self.num_denoisers = len(denoisers)
        self.model_cpu_offload_seq = "->".join([*DENOISER_NAMES[: len(denoisers)][::-1], "vae"])

        self._set_up_noise(scheduler, noise_schedule)
        if prediction_types is None:
            prediction_types = [prediction_type_of(denoiser, self._trained_scheduler) for denoiser in denoisers]
        if guidance_scales is None:
            guidance_scales = [1.0] * len(denoisers)
        settings = {
            "snr_boundaries": [float(boundary) for boundary in listed(snr_boundaries) or []],
            "prediction_types": list(listed(prediction_types) or []),
            "guidance_scales": [float(scale) for scale in listed(guidance_scales) or []],
        }
        self.register_to_config(**settings)
        self._set_up_images(vae, id2label)
        self.intervals()  # raises if the boundaries do not fit
        check_denoisers(denoisers, **settings)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "SNRSplitPipeline":
        """
        Make a pipeline of the components of another SNR-split pipeline, or of one with [`DenoiserExperts`], whose experts become
        the denoisers; see [`~StandalonePipelineMixin.from_pipe`]. `DenoiserExperts.from_pipeline` goes the other way.

        Raises:
            ValueError: if the other pipeline has a single denoiser, and no `denoisers` are given.
        """
        components = pipeline.components.values()
        experts = next((each for each in components if descends_from(each, "DenoiserExperts")), None)
        if experts is not None and kwargs.get("denoisers") is None:
            kwargs["denoisers"] = list(experts.experts)
            if kwargs.get("snr_boundaries") is None:
                kwargs["snr_boundaries"] = experts.intervals.snr_boundaries(trained_scheduler_of(pipeline))
        if kwargs.get("denoisers") is not None:
            kwargs = {name: None for name in pipeline.components if name in DENOISER_NAMES} | kwargs
        elif not set(DENOISER_NAMES) & {*pipeline.components, *kwargs}:
            raise ValueError(
                f"Expected a pipeline of several denoisers, but got a {type(pipeline).__name__}; "
                "`SNRSplitPipeline.from_pipelines` combines those of several pipelines."
            )
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def from_pipelines(
        cls, pipelines: list[DiffusionPipeline], snr_boundaries: list[float], **kwargs
    ) -> "SNRSplitPipeline":
        """
        Combine the denoisers of several pipelines; scheduler, noise schedule, VAE and class names are those of the first.

        Args:
            pipelines (`list[DiffusionPipeline]`): The pipeline for the least noise first; each with a `transformer` or
                `unet`.
            snr_boundaries (`list[float]`): See [`SNRSplitPipeline`].
            kwargs: Other arguments of [`SNRSplitPipeline`].

        Raises:
            ValueError: if a pipeline has no denoiser, or the noise schedules differ.
        """
        denoisers = []
        for pipeline in pipelines:
            denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
            if denoiser is None:
                raise ValueError(
                    "Expected each of `pipelines` to have a `transformer` or `unet`, "
                    f"but got a {type(pipeline).__name__}."
                )
            denoisers.append(denoiser)
        trained = [trained_scheduler_of(pipeline) for pipeline in pipelines]
        for index, scheduler in enumerate(trained):
            if not have_same_noise(scheduler, trained[0]):
                raise ValueError(
                    "Expected `pipelines` to have one noise schedule, but got different ones in "
                    f"{type(pipelines[0].scheduler).__name__} and {type(pipelines[index].scheduler).__name__} (pipelines 0 "
                    f"and {index})."
                )
        defaults = {
            "vae": getattr(pipelines[0], "vae", None),
            "id2label": pipelines[0].config.get("id2label"),
            "prediction_types": [
                prediction_type_of(denoiser, scheduler) for scheduler, denoiser in zip(trained, denoisers)
            ],
            "noise_schedule": trained_noise_of(pipelines[0]),
        }
        return cls(denoisers, pipelines[0].scheduler, snr_boundaries, **defaults | kwargs)

    @property
    def denoisers(self) -> list[ModelMixin]:
        """The denoisers, that for the least noise first."""
        return [getattr(self, name) for name in DENOISER_NAMES[: self.num_denoisers]]

    @property
    def components(self) -> dict[str, Any]:
        """The components that the pipeline has, without those of the names in `DENOISER_NAMES` that are not used."""
        names = ("scheduler", "vae", *DENOISER_NAMES[: self.num_denoisers])
        return {name: getattr(self, name) for name in names}

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        Save all components; see [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: if prompts are attached to a denoiser: they would be lost.
        """
        for index, denoiser in enumerate(self.denoisers):
            if patch_of(denoiser) is not None:
                raise ValueError(
                    f"Expected denoisers without prompts, for which this pipeline has no folder, but got a `PromptPatch` "
                    f"on denoiser {index}; save it by itself, and `detach()` it."
                )
        super().save_pretrained(save_directory, *args, **kwargs)

    def intervals(self, snr_boundaries: list[float] | None = None) -> NoiseIntervals:
        """
        Return which denoiser owns which timesteps.

        Args:
            snr_boundaries (`list[float]` of length N - 1, *optional*): By default those of the configuration.

        Raises:
            ValueError: if the boundaries do not fit the denoisers or the scheduler.
        """
        boundaries = self.config.snr_boundaries if snr_boundaries is None else snr_boundaries
        if len(boundaries) + 1 != self.num_denoisers:
            raise ValueError(
                f"Expected as many denoisers as `snr_boundaries` make intervals, {len(boundaries) + 1}, "
                f"but got {self.num_denoisers}."
            )
        return NoiseIntervals.from_snr(boundaries, self._trained_scheduler)

    def steps_per_denoiser(
        self,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        snr_boundaries: list[float] | None = None,
    ) -> list[int]:
        """
        Count how often each denoiser is called; the arguments are those of a call of the pipeline.

        A second-order scheduler calls a denoiser twice for one step.
        """
        num_inference_steps, timesteps = checked_steps(num_inference_steps, timesteps)
        kinds = self.config.prediction_types
        scheduler = with_trained_noise(self.scheduler, self._trained_scheduler)
        scheduler = set_timesteps(scheduler, self.denoisers, kinds, num_inference_steps, timesteps, "cpu")
        owners = owners_of_steps(scheduler, self.intervals(snr_boundaries))
        return [owners.count(index) for index in range(self.num_denoisers)]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        guidance_scale: float | list[float] | None = None,
        guidance_channels: int | None = None,
        snr_boundaries: list[float] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  Diffusers' own default
        image: PipelineImageInput | None = None,
        num_images_per_label: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images; see [`ClassConditionalPipeline.__call__`] for the other arguments.

        Args:
            guidance_scale (`float` or list of N `float`, *optional*): One number for all denoisers, or one for each; by
                default `guidance_scales` of the configuration. To guide x0 or v is to guide ε: each is linear in the
                others.
            snr_boundaries (`list[float]` of length N - 1, *optional*): By default those of the configuration.
            image (*optional*): The image to enlarge, or B of them, for those denoisers that are super-resolution models.

        Warns:
            If a denoiser gets none of the steps, or, with these boundaries, noise that it was not trained on.
        """
        scales = self.config.guidance_scales if guidance_scale is None else guidance_scale
        if isinstance(scales, (np.ndarray, torch.Tensor)):
            scales = scales.tolist()
        scales = list(scales) if isinstance(scales, (list, tuple)) else [scales] * self.num_denoisers
        if len(scales) != self.num_denoisers:
            raise ValueError(
                f"Expected `guidance_scale` to be a number or {self.num_denoisers} of them, but got {len(scales)}."
            )
        if snr_boundaries is not None:
            for problem in untrained_intervals(self.denoisers, snr_boundaries):
                warnings.warn(problem, stacklevel=3)
        settings = GenerationSettings(
            class_labels=class_labels,
            batch_size=batch_size,
            num_images_per_label=num_images_per_label,
            image=image,
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
        denoisers = [
            DenoiserSettings(denoiser, prediction_type, scale)
            for denoiser, prediction_type, scale in zip(self.denoisers, self.config.prediction_types, scales)
        ]
        return self._generate(settings, denoisers, self.intervals(snr_boundaries))
