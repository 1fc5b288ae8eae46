"""Generate images with one denoiser and any Diffusers scheduler, in pixel or latent space, with or without classes.

Guidance: https://arxiv.org/abs/2207.12598, learned variance: https://arxiv.org/abs/2102.09672.
Legend: B batch, C channels, H and W height and width, in pixels or latent pixels.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, UNet2DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..diffusion.predictions import prediction_type_of
from ..plugins.attachment import patch_of
from ..saving.adapters import check_component
from ..saving.naming import PACKAGE
from .denoising import DenoisingMixin
from .settings import DenoiserSettings, GenerationSettings


class ClassConditionalPipeline(DenoisingMixin, DiffusionPipeline):
    """
    Generate images with one denoiser.

    `from_pretrained` also loads a repository of Diffusers' own `DiTPipeline`, such as facebook/DiT-XL-2-256.

    Args:
        transformer ([`ModelMixin`]): The denoiser: a [`DiTModel`], [`DTRTransformer2DModel`], [`RemixDiTModel`],
            [`PatchedUNet2DModel`], or Diffusers' `DiTTransformer2DModel` or `UNet2DModel`. Called as
            `transformer(sample, timestep, class_labels=…)`; without labels if its configuration has none of `num_classes`,
            `num_embeds_ada_norm` and `num_class_embeds`.
        scheduler ([`SchedulerMixin`]): A scheduler with the noise schedule that the transformer was trained with; see
            docs/schedulers.md for those of Diffusers that fit. The DDPM schedulers use a learned variance, the others
            ignore it. What the transformer predicts (`prediction_type` in its configuration, or else in
            `noise_schedule`) is converted into what the scheduler expects.
        vae ([`AutoencoderKL`], *optional*): For a denoiser of latents.
        id2label (`dict[str, str]`, *optional*): The names of the classes, by index (a string, as in JSON).
        prompt_patch ([`PromptPatch`], *optional*): Prompts to attach to the transformer, in eval mode. The pipeline's
            `prompt_patch` is always the one that is attached to the transformer; it is saved with the pipeline.
        noise_schedule (`dict`, *optional*): The noise that the transformer was trained with, whatever the scheduler, as
            [`noise_schedule_of`] returns it; by default that of the scheduler. It is saved with the pipeline.

    Raises:
        ValueError: if the transformer is wrapped by PEFT, or the scheduler does not fit a given `noise_schedule`.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "prompt_patch"]
    _exclude_from_cpu_offload = ["prompt_patch"]  # it is small, and the transformer calls it

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        prompt_patch: ModelMixin | None = None,
        noise_schedule: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_component("transformer", transformer)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, prompt_patch=prompt_patch)
        self._set_up_noise(scheduler, noise_schedule)
        self._set_up_images(vae, id2label)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "ClassConditionalPipeline":
        """
        Make a pipeline of the components of another one, which are shared; see [`~StandalonePipelineMixin.from_pipe`].

        A `UNet2DModel`, as a [`DDPMPipeline`] has it, becomes the transformer, and the labels of a [`DiTPipeline`] become
        `id2label`.

        Raises:
            ValueError: if a component is missing, or `prompt_patch` is not the one that is attached to the transformer.
        """
        unet = pipeline.components.get("unet")
        if isinstance(unet, UNet2DModel):
            kwargs.setdefault("transformer", unet)
        if isinstance(pipeline, DiTPipeline) and pipeline.labels:
            kwargs.setdefault("id2label", _names_by_index(pipeline.labels))
        made = super().from_pipe(pipeline, **kwargs)
        if kwargs.get("prompt_patch", made.prompt_patch) is not made.prompt_patch:
            raise ValueError(
                "Expected `prompt_patch` to be the one that is attached to the transformer that the pipelines share, but got "
                f"{kwargs['prompt_patch']}; `detach()` the other one first."
            )
        return made

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save all components; see [`DiffusionPipeline.save_pretrained`]."""
        self.register_modules(prompt_patch=self.prompt_patch)
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs) -> None:
        """
        Offload groups of layers; see [`DiffusionPipeline.enable_group_offload`].

        The prompts stay on the accelerator: they are small, and the transformer calls them.
        """
        exclude_modules = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        prompts = [name for name in self._exclude_from_cpu_offload if name in self.components]
        super().enable_group_offload(*args, exclude_modules=[*exclude_modules, *prompts], **kwargs)

    @property
    def denoisers(self) -> list[ModelMixin]:
        """The transformer, in a list."""
        return [self.transformer]

    @property
    def prompt_patch(self) -> ModelMixin | None:
        """The prompts that are attached to the transformer, if any."""
        return patch_of(self.transformer)

    @prompt_patch.setter
    def prompt_patch(self, patch: ModelMixin | None) -> None:
        if patch is not None and patch is not self.prompt_patch:
            patch.attach(self.transformer).eval()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        guidance_scale: float | list[float] = 1.0,
        guidance_channels: int | None = None,
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
        Generate images.

        Args:
            class_labels (`int`, `str`, or a list, array or tensor of shape (B,) of either, *optional*):
                What to generate, as indices or as names of `id2label` (a name is never read as an index); one image for each.
                A single label that is no list is for all `batch_size` images. If None, unconditional images.
            batch_size (`int`, *optional*): B. By default the number of labels, or of images to enlarge, or else 1.
            guidance_scale (`float` or list of B `float`): w of classifier-free guidance; 1 is no guidance.
            guidance_channels (`int`, *optional*): Guide only the first channels; see [`classifier_free_guidance`].
            num_inference_steps (`int`): The number of denoising steps.
            timesteps (`list[int]`, *optional*): Descending timesteps, instead of `num_inference_steps`, for schedulers
                that take them ([`respaced_timesteps`] gives the published choices).
            height, width (`int`, *optional*): Size of the images, in pixels; by default the size of the training images.
            eta (`float`): η of DDIM.
            generator (`torch.Generator` or a list of B, *optional*): With one for each sample, a sample does not depend
                on the others in its batch, up to rounding.
            latents (`torch.Tensor` of shape (B, C, H, W), *optional*): The initial noise, of unit variance.
            output_type (`str`): 'pil', 'np', 'pt' (in [0, 1]) or 'latent'.
            return_dict (`bool`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each step, as in every Diffusers pipeline.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors that the callback gets: 'latents'.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, or a list of them, *optional*): For a
                super-resolution model (`low_res_channels` in its configuration): the image to enlarge, or B of them, all
                of one size. Arrays (h, w, C) and tensors (C, h, w), with or without a batch dimension, have values in
                [0, 1], or in [-1, 1] if some are negative. Without `class_labels`, B is the number of these images.
            num_images_per_label (`int`): As `num_images_per_prompt` of other pipelines: generate so many images for each label
                (and image to enlarge), one after the other. There are then that many times B images, and as many scales,
                generators and latents, where these are given one by one.

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple.

        Raises:
            ValueError: if a label, name, size, scale, image or timestep does not fit the model, numbers of labels, images,
                scales, generators or latents disagree, or the scheduler was made for another number of training timesteps.
        """
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
        prediction_type = prediction_type_of(self.transformer, self._trained_scheduler)
        return self._generate(settings, [DenoiserSettings(self.transformer, prediction_type, guidance_scale)])


def _names_by_index(indices: dict[str, int]) -> dict[str, str]:
    """Turn the labels of a [`DiTPipeline`], an index for each synonym, into names by index."""
    names: dict[str, str] = {}
    for name, index in indices.items():
        names[str(index)] = f"{names[str(index)]}, {name}" if str(index) in names else name
    return names
