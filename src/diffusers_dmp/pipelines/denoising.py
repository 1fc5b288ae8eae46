"""The denoising loop that this package's pipelines share.

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..diffusion.latents import decode_latents, vae_downsampling
from ..intervals import NoiseIntervals
from ..models.class_names import checked_class_names, find_class, label_list
from ..models.inputs import class_count
from .compiling import CompilationMixin
from .denoiser_inputs import Conversion, DenoiserInputs, prepare_guidance
from .image_inputs import prepare_latents, prepare_low_res
from .labels import is_for_all, prepare_labels
from .scheduling import owners_of_steps, prepare_scheduler, set_timesteps, step_arguments, with_trained_noise
from .settings import DenoiserSettings, GenerationSettings, check_outputs
from .trained_noise import TrainedNoiseMixin


class DenoisingMixin(TrainedNoiseMixin, CompilationMixin):
    """
    Generates images with one or more denoisers, for a pipeline that says which denoiser makes which steps.

    The pipeline derives from `DiffusionPipeline` as well, and has the components `scheduler` and `vae`.
    """

    # what `DiffusionPipeline` and the pipeline provide
    vae: AutoencoderKL | None
    progress_bar: Callable[..., Any]
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device

    _callback_tensor_inputs = ["latents"]

    @property
    def num_classes(self) -> int | None:
        """The number of classes that the denoisers know; None if they take no labels."""
        return class_count(self.denoisers[0].config)

    @property
    def has_null_class(self) -> bool:
        """Whether all denoisers were trained to predict without a label as well, which guidance needs."""
        # Diffusers' own DiT, whose configuration has `num_embeds_ada_norm`, always was
        return self.num_classes is not None and all(
            denoiser.config.get("class_dropout_prob", 0) > 0 or "num_embeds_ada_norm" in denoiser.config
            for denoiser in self.denoisers
        )

    @property
    def num_timesteps(self) -> int:
        """The number of denoising steps of the current call."""
        return self._num_timesteps

    def get_label_ids(self, labels: str | list[str]) -> list[int]:
        """
        Return the class indices of names in `id2label` (an entry may list synonyms, separated by commas).

        Raises:
            ValueError: if a name is unknown (the message lists similar ones), or several classes have it.
        """
        return [find_class(str(label), self.config.id2label) for label in label_list(labels)]

    def _set_up_images(self, vae: AutoencoderKL | None, id2label: dict[str, str] | None) -> None:
        names = checked_class_names(id2label)
        self.register_to_config(id2label=id2label and {str(index): name for index, name in names.items()})
        self.vae_scale_factor = vae_downsampling(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def _generate(
        self,
        settings: GenerationSettings,
        denoisers: list[DenoiserSettings],
        intervals: NoiseIntervals | None = None,
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images: what the pipelines' calls have in common.

        Args:
            settings ([`GenerationSettings`]): The arguments of the call.
            denoisers (`list[DenoiserSettings]`): How each denoiser is used.
            intervals ([`NoiseIntervals`], *optional*): Which denoiser owns which timesteps; None for a single denoiser.
        """
        device = self._execution_device
        check_outputs(settings, self._callback_tensor_inputs)

        # 1. Steps
        scheduler = with_trained_noise(self.scheduler, self._trained_scheduler)
        scheduler, keeps_variance = prepare_scheduler(scheduler, self.denoisers)
        kinds = [each.prediction_type for each in denoisers]
        scheduler = set_timesteps(
            scheduler, self.denoisers, kinds, settings.num_inference_steps, settings.timesteps, device
        )
        owners = owners_of_steps(scheduler, intervals)
        for index in sorted(set(range(len(denoisers))) - set(owners)):
            # as the caller's of the pipeline
            warnings.warn(f"Denoiser {index} has none of the {len(owners)} steps.", stacklevel=4)
        step_kwargs = step_arguments(scheduler, settings.generator, settings.eta)
        conversion = Conversion.between(kinds, scheduler)

        # 2. Inputs of the denoisers
        batch_size, inputs = self._prepare_inputs(settings, denoisers, scheduler.timesteps, owners)

        # 3. Initial noise
        latents = prepare_latents(settings, batch_size, self.denoisers[0], self.vae_scale_factor, device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching schedulers have none

        # 4. Denoise
        self._num_timesteps = len(scheduler.timesteps)
        with self._using(scheduler):  # callbacks see the one that makes the steps
            for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
                if i > 0 and owners[i] != owners[i - 1]:
                    self._offload(self.denoisers[owners[i - 1]])
                x_t = latents
                if hasattr(scheduler, "scale_model_input"):  # flow-matching schedulers have none
                    x_t = scheduler.scale_model_input(latents, t)
                model_output = inputs[owners[i]].predict(i, x_t, settings.guidance_channels, keeps_variance)
                if conversion is not None:
                    model_output = conversion(i, model_output, x_t, denoisers[owners[i]].prediction_type)
                latents = scheduler.step(model_output, t, latents, **step_kwargs).prev_sample

                if settings.callback_on_step_end is not None:
                    latents = settings.callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)
                    for each in inputs:
                        each.notice_changes()

        # 5. Images
        self._offload(self.denoisers[owners[-1]])
        images = latents
        if settings.output_type != "latent":
            decoded = latents if self.vae is None else decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(decoded, output_type=settings.output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if settings.return_dict else (images,)

    def _prepare_inputs(
        self,
        settings: GenerationSettings,
        denoisers: list[DenoiserSettings],
        timesteps: torch.Tensor,
        owners: list[int],
    ) -> tuple[int, list[DenoiserInputs]]:
        """Check labels, images and guidance; return the batch size and the inputs of each denoiser."""
        low_res = prepare_low_res(settings.image, self.denoisers)
        num_images = next((len(images) for images in low_res if images is not None), 1)
        batch_size = settings.batch_size
        if batch_size is None and num_images > 1 and is_for_all(settings.class_labels):
            batch_size = num_images  # one for each image to enlarge
        class_labels = prepare_labels(
            settings.class_labels,
            batch_size,
            num_classes=self.num_classes,
            has_null_class=self.has_null_class,
            id2label=self.config.id2label,
        )
        batch_size = batch_size or (1 if class_labels is None else len(class_labels))
        if num_images not in (1, batch_size):
            raise ValueError(f"Expected `image` to be one image or {batch_size} of them, but got {num_images}.")
        repeats = settings.num_images_per_label
        if repeats > 1:
            if settings.class_labels is None or class_labels is None:
                raise ValueError(
                    f"Expected `class_labels` for `num_images_per_label` {repeats}, but got none; without labels, `batch_size` "
                    "is the number of images."
                )
            class_labels = class_labels.repeat_interleave(repeats)
            low_res = [
                each if each is None or num_images == 1 else each.repeat_interleave(repeats, 0) for each in low_res
            ]
            batch_size *= repeats
        device = self._execution_device
        inputs = [
            DenoiserInputs(
                each.denoiser,
                timesteps,
                device,
                [step for step, owner in enumerate(owners) if owner == index],
                guidance=prepare_guidance(each.guidance_scale, batch_size, self.has_null_class, device),
                class_labels=class_labels,
                low_res=None if images is None else images.expand(batch_size, -1, -1, -1),
            )
            for index, (each, images) in enumerate(zip(denoisers, low_res, strict=True))
        ]
        return batch_size, inputs

    def _offload(self, denoiser: ModelMixin) -> None:
        """Move a denoiser off the accelerator if `enable_model_cpu_offload` is on: another model follows it."""
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is denoiser:
                hook.offload()
