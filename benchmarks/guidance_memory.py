"""`python -m benchmarks.guidance_memory`: the memory that the gradient of a guided step takes on a CUDA GPU, estimated without one.

Beside the denoiser's own memory, for one image or video, in float32: weights, and the peak of forward and backward. See
meta_memory.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ResNetConfig, ResNetForImageClassification

from diffusers_dmp import VideoDecoder
from diffusers_dmp.diffusion.latents import decode_latents

from .meta_memory import MetaMemory

GIBIBYTE = 2**30
# stabilityai/stable-diffusion-3-medium's and black-forest-labs/FLUX.1-dev's are of one architecture, and so is Z-Image's
SD3_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class GradientMemory:
    """
    The memory of a gradient, in bytes.

    Args:
        weights (`int`): The frozen weights.
        inference (`int`): The peak of the forward pass without gradients, without the weights.
        peak (`int`): The peak of forward and backward, without the weights.
    """

    weights: int
    inference: int
    peak: int

    def row(self, name: str) -> str:
        """A row of the table that `HEADER` begins."""
        return f"| {name} | " + " | ".join(f"{each / GIBIBYTE:.2f}" for each in vars(self).values()) + " |"


HEADER = "| what | weights, GiB | forward alone, GiB | with the gradient, GiB |\n| --- | --- | --- | --- |"


def gradient_memory(model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> Any:
    """
    Count the memory of ∂(the sum of all outputs)/∂(the input).

    Args:
        model (`nn.Module`): The model, on the `meta` device, frozen.
        forward (`Callable`): What is computed.
        shape (`tuple[int, ...]`): Of the input.
    """
    alone, both = MetaMemory(), MetaMemory()
    inputs = torch.empty(shape, device="meta")
    with alone, torch.no_grad():
        forward(inputs)
    with both:
        leaf = inputs.clone().requires_grad_()
        torch.autograd.grad(forward(leaf).sum(), leaf)
    return GradientMemory(sum(weight.nbytes for weight in model.parameters()), alone.peak_bytes, both.peak_bytes)


def on_meta(make: Callable[[], Any]) -> Any:
    """A frozen model without weights, in eval mode."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def image_vae(**config: Any) -> Any:
    """The VAE of Stable Diffusion 3 and Flux."""
    return on_meta(lambda: AutoencoderKL(**SD3_VAE | config))


def decoders(pixels: int) -> Iterator[tuple[str, GradientMemory]]:
    """Ways to decode a square image of Stable Diffusion 3, Flux or Z-Image."""
    latents = (1, 16, pixels // 8, pixels // 8)

    def memory(vae: Any) -> GradientMemory:
        return gradient_memory(vae, lambda x: decode_latents(vae, x), latents)

    vae = image_vae()
    yield "as it is", memory(vae)
    vae.enable_gradient_checkpointing()
    yield "`enable_gradient_checkpointing()`", memory(vae)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 256, 32
    yield "the same and tiles of 256 pixels", memory(vae)
    tiny = on_meta(lambda: AutoencoderTiny(latent_channels=16))
    yield "`AutoencoderTiny` (TAESD3, TAEF1)", memory(tiny)


def video_decoders(height: int, width: int, frames: int) -> Iterator[tuple[str, GradientMemory]]:
    """Wan 2.1's VAE: the default three frames, each decoded on its own, and one."""
    vae = on_meta(AutoencoderKLWan)
    shape = (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    for chosen, name in ([0], "one frame"), (None, "three frames"):
        decoder = VideoDecoder(vae, frames=chosen)
        yield name, gradient_memory(vae, lambda x, decoder=decoder: decoder.decode(vae, x), shape)


def networks() -> Iterator[tuple[str, GradientMemory]]:
    """What guides, for one image of 224 pixels."""
    resnet = on_meta(lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)))
    yield "ResNet-50", gradient_memory(resnet, lambda images: resnet(images).logits, (1, 3, 224, 224))
    clip = on_meta(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_L14)))
    yield "CLIP ViT-L/14", gradient_memory(clip, lambda images: clip(images).image_embeds, (1, 3, 224, 224))


def main() -> None:
    print(HEADER)
    for name, memory in networks():
        print(memory.row(f"{name}, 224²"), flush=True)
    for pixels in (512, 1024):
        for name, memory in decoders(pixels):
            print(memory.row(f"VAE of SD3, Flux, Z-Image, {pixels}²: {name}"), flush=True)
    for name, memory in video_decoders(480, 832, 81):
        print(memory.row(f"VAE of Wan 2.1, 832 × 480: {name}"), flush=True)


if __name__ == "__main__":
    main()
