"""What the pipelines of this package have in common: labels, guidance, timesteps, initial noise and decoding.

Legend: B batch, C channels, H and W height and width, in pixels or latent pixels.
"""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..diffusion.latents import decode_latents, vae_downsampling
from ..intervals import check_timesteps, check_train_timesteps
from ..models.inputs import class_count
from ..saving.mixins import StandalonePipelineMixin
from .denoiser_inputs import Conversion, DenoiserInputs

LEARNED_VARIANCES = ("learned", "learned_range")


class DenoisingMixin(StandalonePipelineMixin):
    """
    The parts of a denoising loop. A pipeline that derives from it has the components `scheduler` and `vae` and says which
    are its denoisers.
    """

    _callback_tensor_inputs = ["latents"]

    @property
    def denoisers(self) -> list[ModelMixin]:
        """All that the pipeline has, alike in channels, size and classes."""
        raise NotImplementedError

    def _set_up_images(self, vae: AutoencoderKL | None, id2label: dict[str, str] | None) -> None:
        self.register_to_config(id2label=id2label and {str(index): name for index, name in id2label.items()})
        self.vae_scale_factor = vae_downsampling(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def num_classes(self) -> int | None:
        """How many classes the denoisers know; None for such as take no labels."""
        return class_count(self.denoisers[0].config)

    @property
    def has_null_class(self) -> bool:
        """Whether all denoisers learned to go without a label, as guidance needs it."""
        # Diffusers' own DiT always has; it is the one that counts its classes as `num_embeds_ada_norm`
        return self.num_classes is not None and all(
            denoiser.config.get("class_dropout_prob", 0) > 0 or "num_embeds_ada_norm" in denoiser.config
            for denoiser in self.denoisers
        )

    def get_label_ids(self, labels: "str | list[str]") -> list[int]:
        """
        Class indices of the names in `id2label` (a name may list synonyms between commas).

        Raises:
            ValueError: if a name is unknown; the message lists the known ones.
        """
        label2id = {
            name.strip(): int(index)
            for index, names in (self.config.id2label or {}).items()
            for name in names.split(",")
        }
        labels = [labels] if isinstance(labels, str) else labels
        for label in labels:
            if label not in label2id:
                raise ValueError(f"Expected `class_labels` to be among {list(label2id)}, but got {label!r}.")
        return [label2id[label] for label in labels]

    def _generate(
        self,
        own_types: list[str],
        guidance_scales: list,
        owners_of_steps: "Callable[[SchedulerMixin], list[int]]",
        *,
        class_labels,
        batch_size: int,
        guidance_channels: int | None,
        num_inference_steps: int,
        timesteps: list[int] | None,
        height: int | None,
        width: int | None,
        eta: float,
        generator,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> "ImagePipelineOutput | tuple":
        """
        The pipelines' calls, but for who denoises when.

        Args:
            own_types (`list[str]`): What each denoiser predicts.
            guidance_scales (`list`): Each denoiser's.
            owners_of_steps (`Callable`): From the scheduler, its timesteps set, to the denoiser of each step.
        """
        device = self._execution_device
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)

        # 1. What is asked for
        class_labels = self._prepare_labels(class_labels, batch_size)
        batch_size = self._checked_batch_size(class_labels, batch_size)
        guidance = [self._prepare_guidance(scale, batch_size) for scale in guidance_scales]

        # 2. When, and by whom
        scheduler, keeps_variance = self._prepare_scheduler()
        self._prepare_timesteps(scheduler, num_inference_steps, timesteps, device)
        owners = owners_of_steps(scheduler)
        step_kwargs = self._step_kwargs(scheduler, generator, eta)
        conversion = Conversion.between(own_types, scheduler, device)

        inputs = [
            DenoiserInputs(denoiser, own_type, scale, class_labels, scheduler.timesteps, device, self.num_classes)
            for denoiser, own_type, scale in zip(self.denoisers, own_types, guidance, strict=True)
        ]

        # 3. From what
        latents = self._prepare_latents(batch_size, height, width, generator, latents, device)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow-matching ones do without

        # 4. Denoise
        self._num_timesteps = len(scheduler.timesteps)
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            if i > 0 and owners[i] != owners[i - 1]:
                self._offload(self.denoisers[owners[i - 1]])
            x_t = latents
            if hasattr(scheduler, "scale_model_input"):  # flow-matching ones do without
                x_t = scheduler.scale_model_input(latents, t)
            model_output = inputs[owners[i]].predict(i, x_t, guidance_channels, keeps_variance)
            if conversion is not None:
                model_output = conversion(i, model_output, x_t, own_types[owners[i]])
            latents = scheduler.step(model_output, t, latents, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)

        # 5. To images
        self._offload(self.denoisers[owners[-1]])
        images = latents
        if output_type != "latent":
            decoded = latents if self.vae is None else decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _offload(self, denoiser: ModelMixin) -> None:
        """Off the accelerator, if that is what `enable_model_cpu_offload` asked for; another model comes."""
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is denoiser:
                hook.offload()

    def _check_outputs(self, output_type: str, callback_tensor_inputs: list[str]) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Expected `output_type` to be 'pil', 'np', 'pt' or 'latent', but got {output_type!r}.")
        unknown_inputs = set(callback_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown_inputs:
            raise ValueError(
                f"Expected `callback_on_step_end_tensor_inputs` to be among {self._callback_tensor_inputs}, "
                f"but got {sorted(unknown_inputs)}."
            )

    @property
    def num_timesteps(self) -> int:
        """The number of denoising steps of the call under way."""
        return self._num_timesteps

    def _prepare_labels(self, class_labels, batch_size: int) -> torch.LongTensor | None:
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError(f"Expected no `class_labels` for a model without classes, but got {class_labels}.")
            return None
        if class_labels is None:
            if not self.has_null_class and self.num_classes > 1:
                raise ValueError(
                    f"Expected `class_labels` for a model of {self.num_classes} classes and no null class, but got None."
                )
            return torch.full((batch_size,), self.num_classes if self.has_null_class else 0)
        if not isinstance(class_labels, torch.Tensor):
            class_labels = (
                list(class_labels) if isinstance(class_labels, (list, tuple, np.ndarray)) else [class_labels]
            )
            if any(isinstance(label, str) for label in class_labels):
                class_labels = self.get_label_ids(class_labels)
            class_labels = torch.as_tensor(np.asarray(class_labels, dtype=None if class_labels else np.int64))
        if class_labels.is_floating_point():
            raise ValueError(f"Expected `class_labels` to be integers or names, but got {class_labels.tolist()}.")
        class_labels = class_labels.long().cpu().reshape(-1)
        last = self.num_classes - (not self.has_null_class)
        if len(class_labels) == 0 or class_labels.min() < 0 or class_labels.max() > last:
            raise ValueError(f"Expected `class_labels` to be in [0, {last}], but got {class_labels.tolist()}.")
        return class_labels

    def _checked_batch_size(self, class_labels: torch.LongTensor | None, batch_size: int) -> int:
        batch_size = batch_size if class_labels is None else len(class_labels)
        if batch_size < 1:
            raise ValueError(f"Expected `batch_size` to be at least 1, but got {batch_size}.")
        return batch_size

    def _step_kwargs(self, scheduler, generator, eta: float) -> dict:
        parameters = inspect.signature(scheduler.step).parameters
        return {name: value for name, value in {"generator": generator, "eta": eta}.items() if name in parameters}

    def _prepare_guidance(self, guidance_scale, batch_size: int) -> torch.Tensor | None:
        """The scale (B or 1, 1, 1, 1), in float32 whatever the model's dtype; None if it does not guide."""
        scales = torch.as_tensor(guidance_scale, dtype=torch.float32, device="cpu").reshape(-1)
        if len(scales) not in (1, batch_size):
            raise ValueError(
                f"Expected `guidance_scale` to be a number or {batch_size} of them, but got {len(scales)}."
            )
        if (scales == 1).all():
            return None
        if not self.has_null_class:
            raise ValueError(
                f"Expected `guidance_scale` to be 1 for a model without a null class, but got {guidance_scale}."
            )
        return scales.to(self._execution_device).view(-1, 1, 1, 1)

    def _prepare_timesteps(self, scheduler, num_inference_steps: int, timesteps: list[int] | None, device) -> None:
        num_train_timesteps = None
        for denoiser in self.denoisers:
            if denoiser.config.get("num_train_timesteps") is not None:
                num_train_timesteps = denoiser.config.num_train_timesteps
                check_train_timesteps(scheduler, num_train_timesteps)
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=device)
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            raise ValueError(
                f"Expected a scheduler that takes `timesteps`, but got a {type(scheduler).__name__}, which does not."
            )
        if num_train_timesteps is not None:
            check_timesteps(scheduler.timesteps.cpu(), num_train_timesteps)  # once, not at every step

    def _prepare_scheduler(self) -> tuple[SchedulerMixin, bool]:
        """The scheduler to step, and whether it is handed the variance channels."""
        if self.scheduler.config.get("variance_type") not in LEARNED_VARIANCES:
            return self.scheduler, False
        if not isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler)):
            # the DPM-Solver family would cut the prediction, which is all that it gets, to its first 3 channels
            return _replaced(self.scheduler, variance_type=None), False
        for config in (denoiser.config for denoiser in self.denoisers):
            if config.out_channels != 2 * config.in_channels:
                raise ValueError(
                    f"Expected the scheduler's `variance_type` to be a fixed one for a model of {config.in_channels} input "
                    f"and {config.out_channels} output channels, but got {self.scheduler.config.variance_type!r}."
                )
        return self.scheduler, True

    def _prepare_latents(self, batch_size: int, height, width, generator, latents, device) -> torch.Tensor:
        config = self.denoisers[0].config
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"Expected `generator` to be one or a list of {batch_size}, but got {len(generator)}.")
        trained = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
        sizes = [
            own * self.vae_scale_factor if asked is None else asked
            for own, asked in zip(trained, (height, width), strict=True)
        ]
        multiple = self.vae_scale_factor * config.get("patch_size", 1)
        if any(size < multiple or size % multiple for size in sizes):
            raise ValueError(
                f"Expected `height` and `width` to be divisible by {multiple}, but got {sizes[0]} x {sizes[1]}."
            )
        shape = (batch_size, config.in_channels, *(size // self.vae_scale_factor for size in sizes))
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.denoisers[0].dtype)
        if latents.shape != shape:
            raise ValueError(f"Expected `latents` to have the shape {shape}, but got {tuple(latents.shape)}.")
        return latents.to(device, self.denoisers[0].dtype)


def _replaced(scheduler: SchedulerMixin, **settings) -> SchedulerMixin:
    """A new scheduler with other settings, guided as it was."""
    if hasattr(scheduler, "around"):  # a `GuidedScheduler`, which is an instance of what it guides
        return scheduler.around(_replaced(scheduler.scheduler, **settings))
    return type(scheduler).from_config(scheduler.config, **settings)
