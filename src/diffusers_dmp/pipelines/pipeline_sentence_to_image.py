"""Generate images from sentences, with Stable Diffusion 3's transformer and one sentence encoder, in pixel or latent space.

Transformer: https://arxiv.org/abs/2403.03206, sentence encoders: https://arxiv.org/abs/1908.10084.
Legend: B batch, L tokens, D width of the text, C channels, H and W height and width, in pixels or latent pixels.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..diffusion.latents import decode_latents, vae_downsampling
from ..saving.adapters import check_component
from ..saving.naming import PACKAGE
from ..saving.pipeline_mixin import StandalonePipelineMixin
from .image_inputs import prepare_latents
from .scheduling import set_timesteps, step_arguments
from .sentences import check_text_width, given_embeddings, negative_first, texts_of, warn_of_cut_prompts
from .settings import GenerationSettings, check_outputs, checked_count


class SentenceToImagePipeline(StandalonePipelineMixin, DiffusionPipeline, SD3LoraLoaderMixin):
    """
    Generate images from sentences with a flow-matching transformer that is small enough to train at home.

    `StableDiffusion3Pipeline` needs two CLIP encoders and a VAE. This pipeline needs one encoder of sentences, such as
    sentence-transformers/all-MiniLM-L6-v2, and can do without a VAE. The transformer is the same class and is called the same
    way, so that LoRA files, [`LoraExperts`] and [`DenoiserExperts`] work alike.

    Args:
        transformer ([`ModelMixin`]): An `SD3Transformer2DModel`, or [`DenoiserExperts`] made of them. None for a pipeline that
            encodes prompts alone.
        scheduler ([`SchedulerMixin`]): A flow-matching scheduler, such as `FlowMatchEulerDiscreteScheduler`.
        text_encoder (`PreTrainedModel`, *optional*): An encoder of the hidden size `joint_attention_dim` and
            `pooled_projection_dim`. Without it, the pipeline is called with embeddings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The encoder's.
        vae ([`AutoencoderKL`], *optional*): For a transformer of latents.
        max_sequence_length (`int`): L, to which prompts are padded: the one that the transformer was trained with.
        image_channels (`int`, *optional*): The channels of images without a VAE; by default those of the transformer. It is saved
            with the pipeline.

    Raises:
        ValueError: if the transformer is wrapped by PEFT, `max_sequence_length` is no integer from 1, or the encoder has another
            hidden size than the transformer expects.
    """

    __module__ = PACKAGE  # the library that `save_pretrained` names
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "vae"]
    _callback_tensor_inputs = ["latents"]
    _lora_loadable_modules = ["transformer"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vae: AutoencoderKL | None = None,
        max_sequence_length: int = 16,
        image_channels: int | None = None,
    ):
        super().__init__()
        check_component("transformer", transformer)
        check_text_width(text_encoder, transformer)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae
        )
        self.register_to_config(
            max_sequence_length=checked_count("max_sequence_length", max_sequence_length),
            image_channels=image_channels or (transformer and transformer.config.in_channels),
        )
        self.vae_scale_factor = vae_downsampling(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def guidance_scale(self) -> float:
        """w of classifier-free guidance in the current call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call is guided, with a batch of 2·B."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of denoising steps of the current call."""
        return self._num_timesteps

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], device: torch.device | str | None = None, num_images_per_prompt: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode prompts: each token by itself, zeros where a prompt is padded, and their mean for the whole sentence.

        Args:
            prompt (`str` or list of B `str`): The prompts. The end of one that is longer than `max_sequence_length` tokens is
                left out, with a warning.
            device (`torch.device`, *optional*): Where to encode; by default where the pipeline is.
            num_images_per_prompt (`int`): How often to repeat each prompt.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `prompt_embeds` (B, L, D) and `pooled_prompt_embeds` (B, D).

        Raises:
            ValueError: if the pipeline has no text encoder or tokenizer, or `prompt` is no text.
        """
        prompts = texts_of("prompt", prompt)
        repeats = checked_count("num_images_per_prompt", num_images_per_prompt)
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "Expected a pipeline with `text_encoder` and `tokenizer` to encode prompts, but got one without; pass "
                "`prompt_embeds` and `pooled_prompt_embeds`."
            )
        device = device or self._execution_device
        length = self.config.max_sequence_length
        warn_of_cut_prompts(self.tokenizer, prompts, length)
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"]
        encoded = self.text_encoder(tokens["input_ids"], attention_mask=mask).last_hidden_state  # (B, L, D)
        encoded = encoded * mask.unsqueeze(-1).to(encoded.dtype)
        pooled = encoded.sum(dim=1) / mask.sum(dim=1, keepdim=True).to(encoded.dtype)
        return encoded.repeat_interleave(repeats, 0), pooled.repeat_interleave(repeats, 0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  Diffusers' own default
    ) -> ImagePipelineOutput | tuple:
        """
        Generate images.

        Args:
            prompt (`str` or list of B `str`, *optional*): What to generate.
            negative_prompt (`str` or list of B `str`, *optional*): What to guide away from; by default the empty prompt.
            height, width (`int`, *optional*): Size of the images, in pixels; by default the size of the training images.
            num_inference_steps (`int`): The number of denoising steps.
            guidance_scale (`float`): w of classifier-free guidance; 1 is no guidance.
            num_images_per_prompt (`int`): Generate so many images for each prompt, one after the other; B counts them all.
            generator (`torch.Generator` or a list of B, *optional*): With one for each sample, a sample does not depend
                on the others in its batch, up to rounding.
            latents (`torch.Tensor` of shape (B, C, H, W), *optional*): The initial noise, of unit variance.
            prompt_embeds, pooled_prompt_embeds (`torch.Tensor`, *optional*): What [`~SentenceToImagePipeline.encode_prompt`]
                returns, instead of `prompt`.
            negative_prompt_embeds, negative_pooled_prompt_embeds (`torch.Tensor`, *optional*): The same for
                `negative_prompt`.
            output_type (`str`): 'pil', 'np', 'pt' (in [0, 1]) or 'latent'.
            return_dict (`bool`): Whether to return an [`ImagePipelineOutput`] or a tuple.
            joint_attention_kwargs (`dict`, *optional*): Passed on to the transformer; `{"scale": 0.5}` halves a LoRA.
            callback_on_step_end (`Callable`, *optional*): Called after each step, as in every Diffusers pipeline.
            callback_on_step_end_tensor_inputs (`list[str]`): The tensors that the callback gets: 'latents'.

        Returns:
            [`ImagePipelineOutput`] with `images`, or a tuple.

        Raises:
            ValueError: if there are both prompts and embeddings, or neither, their numbers or shapes disagree, the scheduler is
                no flow-matching one, or a size, number or generator does not fit.
        """
        repeats = checked_count("num_images_per_prompt", num_images_per_prompt)
        settings = GenerationSettings(
            class_labels=None,
            batch_size=None,
            num_images_per_label=repeats,
            image=None,
            guidance_channels=None,
            num_inference_steps=num_inference_steps,
            timesteps=None,
            height=height,
            width=width,
            eta=0.0,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_outputs(settings, self._callback_tensor_inputs)
        device = self._execution_device
        self._guidance_scale = guidance_scale

        # 1. Text
        text = self._embeddings("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        batch_size = len(text[0]) * repeats
        if self.do_classifier_free_guidance:
            if all(each is None for each in (negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)):
                negative_prompt = ""
            given = (negative_prompt_embeds, negative_pooled_prompt_embeds)
            negative = self._embeddings("negative_prompt", negative_prompt, *given)
            text = [negative_first(*pair) for pair in zip(negative, text, strict=True)]
        text = [each.repeat_interleave(repeats, 0).to(device, self.transformer.dtype) for each in text]

        # 2. Steps and initial noise
        scheduler = set_timesteps(
            self.scheduler, [self.transformer], ["flow_prediction"], settings.num_inference_steps, None, device
        )
        timesteps = scheduler.timesteps.to(device)  # the scheduler's own are on the CPU
        step_kwargs = step_arguments(scheduler, settings.generator, settings.eta)
        latents = prepare_latents(settings, batch_size, self.transformer, self.vae_scale_factor, device)
        self._num_timesteps = len(scheduler.timesteps)

        # 3. Denoise
        for i, t in enumerate(self.progress_bar(scheduler.timesteps)):
            x_t = torch.cat([latents, latents]) if self.do_classifier_free_guidance else latents
            velocity = self.transformer(
                hidden_states=x_t,
                timestep=timesteps[i].expand(len(x_t)),
                encoder_hidden_states=text[0],
                pooled_projections=text[1],
                joint_attention_kwargs=joint_attention_kwargs,
                return_dict=False,
            )[0]
            if self.do_classifier_free_guidance:
                unconditional, conditional = velocity.chunk(2)
                # v = v(∅) + w·(v(c) - v(∅)), https://arxiv.org/abs/2207.12598
                velocity = torch.lerp(unconditional, conditional, guidance_scale)
            latents = scheduler.step(velocity, t, latents, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, i, t, {"latents": latents}).pop("latents", latents)

        # 4. Images
        images = latents
        if output_type != "latent":
            decoded = latents if self.vae is None else decode_latents(self.vae, latents)
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """
        Load a LoRA into the transformer; see [`SD3LoraLoaderMixin.load_lora_weights`], which also needs two CLIP encoders.

        Raises:
            ValueError: if there is no LoRA of a transformer in the file.
        """
        loading = {key: kwargs.pop(key) for key in ("low_cpu_mem_usage",) if key in kwargs}
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        prefix = f"{self.transformer_name}."
        if not any(key.startswith(prefix) and "lora" in key for key in state_dict):
            raise ValueError(
                f"Expected a LoRA with weights of the transformer, called '{prefix}…lora…', but got "
                f"{', '.join(list(state_dict)[:3]) or 'none'}."
            )
        self.load_lora_into_transformer(
            state_dict,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,  # whose offloading hooks are taken off meanwhile, as in every pipeline of Diffusers
            hotswap=hotswap,
            **loading,
        )

    def _embeddings(self, name: str, prompt: Any, *given: torch.Tensor | None) -> list[torch.Tensor]:
        """The embeddings of prompts, or those that are given in their place: [(B, L, D), (B, D)]."""
        embeddings = given_embeddings(name, prompt, given, self.transformer.config)
        return list(self.encode_prompt(texts_of(name, prompt))) if embeddings is None else embeddings
