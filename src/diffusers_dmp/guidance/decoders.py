"""How the latents of a pipeline become the images that guide it.

Legend: B batch, C channels, N patches, F frames of latents and f chosen frames (videos only), H and W height and width in pixels,
h and w those of the latents.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..diffusion.latents import decode_latents, unpack_latents
from .decoding_vae import frozen_vae
from .patch_positions import PatchPositions


class LatentDecoder:
    """
    Decode latents (B, C, h, w) of a VAE, as most pipelines have them.

    It decodes in float32, or in bfloat16 if the VAE is in bfloat16; a gradient in float16 would underflow. Only latents get
    gradients. The VAE itself does not change: where it is in float16 or offloaded, its weights are copied when a run first decodes,
    and the copy is dropped when the run ends.

    For pipelines that have their latents in another way, derive from it and override `decode`, or give it a function; see
    [`register_decoder`].

    Args:
        vae ([`AutoencoderKL`] or the like): The VAE.
        decode (`Callable`, *optional*): A function of the VAE and of latents as the scheduler sees them, (B, …), which returns
            images (B, 3, H, W) or videos (B, f, 3, H, W) in [-1, 1]. By default [`decode_latents`].
    """

    def __init__(self, vae: Any, decode: "Callable[[Any, torch.Tensor], torch.Tensor] | None" = None):
        self.vae = vae
        self._decode = decode
        self._frozen: Any = None

    @classmethod
    def from_pipeline(cls, pipeline: Any, vae: Any = None, **settings: Any) -> "LatentDecoder":
        """
        Make the decoder of a pipeline.

        Args:
            pipeline ([`DiffusionPipeline`]): The pipeline.
            vae (*optional*): Another VAE of the same latents, such as a small [`AutoencoderTiny`]; by default `pipeline.vae`.
            settings: Further arguments of this class.

        Raises:
            ValueError: if the class does not have an argument.
        """
        if "frames" in settings or "exact" in settings:
            raise ValueError(
                f"Expected no `frames` and no `exact` for a {type(pipeline).__name__}, which is guided by whole images, but got "
                f"{settings}."
            )
        return cls(pipeline.vae if vae is None else vae, **settings)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decode latents as the scheduler sees them.

        Args:
            latents (`torch.Tensor` of shape (B, …)): Scaled latents.

        Returns:
            `torch.Tensor` of shape (B, 3, H, W), or (B, f, 3, H, W) for videos: images in [-1, 1].
        """
        if self._frozen is None:
            self._frozen = frozen_vae(self.vae)
        return self.decode(self._frozen.to(latents.device), latents).to(latents.dtype)

    def decode(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """
        Decode latents by a VAE that gradients can go through.

        Args:
            vae ([`AutoencoderKL`] or the like): The VAE, or a copy of it.
            latents (`torch.Tensor` of shape (B, …)): Scaled latents.

        Returns:
            `torch.Tensor` of shape (B, 3, H, W), or (B, f, 3, H, W) for videos: images in [-1, 1].
        """
        if self._decode is not None:
            return self._decode(vae, latents)
        if latents.ndim != 4:
            raise ValueError(
                f"Expected latents (B, C, h, w), but got the shape {tuple(latents.shape)}. `GuidedScheduler.for_pipeline` finds the "
                "decoder of packed latents and of videos."
            )
        return decode_latents(vae, latents)

    def reset(self) -> None:
        """Forget what belongs to one run of the pipeline, before it and after it."""
        self._frozen = None


class PackedLatentDecoder(LatentDecoder):
    """
    Decode patches (B, N, 4·C) of 2 x 2 latent pixels, as the denoisers of Flux, Chroma and Qwen-Image take them.

    64 x 16 patches are as many as 32 x 32, and a scheduler cannot tell which. The pipeline tells its denoiser at every step; a
    hook on the denoiser notes it, and is removed when the decoder is no longer used.

    Args:
        vae ([`AutoencoderKL`], [`AutoencoderKLQwenImage`] or the like): The VAE.
        positions ([`PatchPositions`]): What the denoiser was told.
    """

    def __init__(self, vae: Any, positions: PatchPositions):
        super().__init__(vae)
        self.positions = positions

    @classmethod
    def from_pipeline(cls, pipeline: Any, vae: Any = None, **settings: Any) -> "PackedLatentDecoder":
        decoder: Any = super().from_pipeline(pipeline, vae, positions=PatchPositions(), **settings)
        decoder.positions.note_calls_of(pipeline.transformer, while_used=decoder)
        return decoder

    def decode(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, N, 4·C); see [`LatentDecoder`]."""
        rows, columns = self.positions.grid(latents)
        unpacked = unpack_latents(latents, 2 * rows, 2 * columns)
        if "temperal_downsample" in vae.config:  # Qwen-Image's is a VAE of videos, of one frame
            return decode_latents(vae, unpacked[:, :, None])[:, :, 0]
        return decode_latents(vae, unpacked)

    def reset(self) -> None:
        super().reset()
        self.positions.forget()


class VideoDecoder(LatentDecoder):
    """
    Decode chosen frames of latents (B, C, F, h, w) of a causal video VAE, Wan's.

    The first latent frame is one frame of the video, and each of the others stands for several (Wan: 4), which depend on all
    frames before. Decoded on its own, a latent frame gives one image of what is to be seen in it, as in previews: the time is that
    of `f` images, however long the video is, and the memory that of one, for the activations of several are computed again in the
    backward pass. With `exact=True`, the frames are those of the decoded video; the VAE decodes all latent frames up to the last
    chosen one, and the activations of all of them stay in memory until the gradient is known.

    Args:
        vae ([`AutoencoderKLWan`] or the like): The VAE.
        frames (`list[int]`, *optional*): Which frames of the video guide, from 0; negative ones count from its end. By default the
            first, the middle and the last one.
        exact (`bool`): Decode the frames as in the whole video.
        first_is_given (`bool`): The first frame is an image that the pipeline puts in the place of what it generates, as
            Wan 2.2's 5B model for image to video does: only others can guide, and not exactly.

    Raises:
        ValueError: if `frames` is empty, or the video is to be exact without its first frame; when it decodes, if the video does
            not have such frames.
    """

    def __init__(self, vae: Any, frames: "list[int] | None" = None, exact: bool = False, first_is_given: bool = False):
        super().__init__(vae)
        if frames is not None and len(frames) == 0:
            raise ValueError("Expected `frames` to name one frame or more, but got none.")
        if exact and first_is_given:
            raise ValueError(
                "Expected `exact` to be False where a given image is the first frame, which the scheduler does not see."
            )
        self.frames = frames
        self.exact = exact
        self.first_is_given = first_is_given

    @classmethod
    def from_pipeline(cls, pipeline: Any, vae: Any = None, **settings: Any) -> "VideoDecoder":
        given = "ImageToVideo" in type(pipeline).__name__ and bool(pipeline.config.get("expand_timesteps"))
        return cls(pipeline.vae if vae is None else vae, **{"first_is_given": given} | settings)

    def decode(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode chosen frames of latents (B, C, F, h, w) to (B, f, 3, H, W); see [`LatentDecoder`]."""
        each = vae.config.scale_factor_temporal
        frames = self._chosen(1 + each * (latents.shape[2] - 1))
        latent_frames = [(frame + each - 1) // each for frame in frames]
        if self.exact:
            video = decode_latents(vae, latents[:, :, : max(latent_frames) + 1])
            # a list as the index would have to be copied to an accelerator
            return torch.stack([video[:, :, frame] for frame in frames], dim=1)
        images = [
            checkpoint(decode_latents, vae, latents[:, :, index : index + 1], use_reentrant=False)
            if len(frames) > 1
            else decode_latents(vae, latents[:, :, index : index + 1])
            for index in latent_frames
        ]
        return torch.cat(images, dim=2).transpose(1, 2)

    def _chosen(self, count: int) -> list[int]:
        """The chosen ones of `count` frames, counted from 0."""
        first = int(self.first_is_given)
        if self.frames is None:
            return sorted({*range(1 - first), count // 2, count - 1})
        for frame in self.frames:
            if not first <= frame < count and not -count + first <= frame < 0:
                raise ValueError(
                    f"Expected `frames` to be in [{first}, {count - 1}], or negative and counted from the end, for a video of "
                    f"{count} frames{' of which the first is given' * first}, but got {frame}."
                )
        return [frame % count for frame in self.frames]
