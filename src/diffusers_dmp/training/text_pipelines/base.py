"""What a family of Diffusers' text-to-image pipelines needs to be trained.

Legend: B batch, b samples encoded at once, L text tokens, C channels, F frames (videos only), H and W height and width in pixels,
h and w those of the latents.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...diffusion.latents import latent_distribution, latent_shift_and_scale, scale_latents, vae_downsampling

Columns = dict[str, torch.Tensor | list[torch.Tensor]]


class TextPipeline:
    """
    How the pipelines of one family encode prompts and images, and call their denoiser.

    A family is a subclass. It has no state of a training: the same instance serves all pipelines of the family.
    """

    component: str = "transformer"
    """The name of the denoiser in the pipeline."""
    components: tuple[str, ...] = ("transformer",)
    """The names of all denoisers that a pipeline of this family may have, that for the most noise first."""
    text_components: tuple[str, ...] = ("tokenizer", "text_encoder")
    """The components without which a pipeline cannot encode prompts."""
    needs_vae: bool = True
    """Whether pipelines have to have a VAE; others may denoise pixels."""
    packed_size: int = 1
    """How many latent pixels, along one axis, the pipeline packs into one before it calls the denoiser."""

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> Columns:
        """
        Encode prompts as the pipeline itself does, without guidance.

        Args:
            pipeline ([`DiffusionPipeline`]): With its text encoders.
            prompts (`list[str]`): b prompts. One that is longer than an encoder takes is cut, as in inference; an empty one stands
                for the pipeline's unconditional prediction.

        Returns:
            Columns by name: tensors of shape (b, …), or lists of b tensors of which the first dimension differs. Such a column
            has no padding; where the denoiser has to know the padding of a batch, the family has a column of ones beside it,
            which padding by zeros makes a mask.

        Raises:
            ValueError: if the pipeline lacks a text encoder or a tokenizer.
        """
        missing = [name for name in self.text_components if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"Expected a {type(pipeline).__name__} that encodes prompts, but got one without "
                f"{', '.join(f'`{name}`' for name in missing)}; load it with all of its components."
            )
        with torch.no_grad():
            return self.prompt_columns(pipeline, list(prompts))

    def prompt_columns(self, pipeline: Any, prompts: list[str]) -> Columns:
        """The columns of [`~TextPipeline.encode_prompts`], which has checked the text encoders; each family has its own."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode images into latents, scaled as the denoiser sees them.

        Args:
            pipeline ([`DiffusionPipeline`]): With its VAE.
            images (`torch.Tensor` of shape (b, 3, H, W), or (b, 3, F, H, W) for videos): In [-1, 1].

        Returns:
            Mean and standard deviation of the latents (b, C, [F,] h, w), in float32, not packed.

        Raises:
            ValueError: if height or width is not divisible by [`~TextPipeline.size_multiple`].
        """
        height, width = images.shape[-2:]
        multiple = self.size_multiple(pipeline)
        if height % multiple or width % multiple:
            raise ValueError(
                f"Expected height and width of images to be divisible by the {multiple} pixels of a {type(pipeline).__name__}'s "
                f"latents, but got {height} x {width}."
            )
        mean, std = latent_distribution(pipeline.vae, images.to(pipeline.vae.device))
        mean, std = mean.float(), std.float()
        _, scale = latent_shift_and_scale(pipeline.vae, std)
        return scale_latents(pipeline.vae, mean), std * scale

    def size_columns(
        self, original_sizes: torch.Tensor, crop_offsets: torch.Tensor, target_sizes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Return what the denoiser is told about the sizes of images: nothing in most families.

        Args:
            original_sizes (`torch.Tensor` of shape (b, 2)): Height and width of the images before they were resized.
            crop_offsets (`torch.Tensor` of shape (b, 2)): The pixels cut off at the top and at the left, after resizing.
            target_sizes (`torch.Tensor` of shape (b, 2)): Height and width of the images as they are encoded.

        Returns:
            Columns of shape (b, …) by name.
        """
        return {}

    def size_multiple(self, pipeline: Any) -> int:
        """
        Return the number of pixels by which height and width of images have to be divisible.

        Args:
            pipeline ([`DiffusionPipeline`]): With its VAE.
        """
        denoisers = (getattr(pipeline, name, None) for name in self.components)
        denoiser = next((each for each in denoisers if each is not None), None)
        # without a denoiser, which encoding does not need: that of all published ones
        config = {"patch_size": 2} if denoiser is None else denoiser.config
        return vae_downsampling(pipeline.vae) * self.token_size(config)

    def token_size(self, config: Mapping[str, Any]) -> int:
        """
        Return the side of the squares of latent pixels that become tokens; 1 for a denoiser without patches.

        Args:
            config (`Mapping`): The denoiser's configuration.
        """
        patch_size = config.get("patch_size") or 1
        patch = patch_size[-1] if isinstance(patch_size, (tuple, list)) else patch_size
        return max(patch, self.packed_size)

    def call(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        x_t: torch.Tensor,
        time: torch.Tensor,
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """
        Call the denoiser as the pipeline calls it, without guidance.

        Args:
            model (`nn.Module`): The denoiser, as `accelerator.prepare` returned it.
            config (`Mapping`): The denoiser's configuration.
            x_t (`torch.Tensor` of shape (B, C, [F,] h, w)): Noisy latents, not packed.
            time (`torch.Tensor` of shape (B,)): What the denoiser is told; see [`TimeArgument`].
            conditions (`Mapping[str, torch.Tensor]`): The columns of a batch, those of the prompts and those of the sizes:
                tensors of shape (B, …), in which shorter ones are padded with zeros along L.

        Returns:
            `torch.Tensor` of the shape of `x_t`: the velocity ε - x0 of a flow-matching model, or what the pipeline's
            `prediction_type` says; without a predicted variance.
        """
        raise NotImplementedError


def default_of_call(pipeline: Any, name: str) -> Any:
    """Return the default of an argument of a pipeline's `__call__`, where `encode_prompt` has another one."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default
