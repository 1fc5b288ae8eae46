"""What saves memory when gradients go through a VAE: checkpointing, tiles, slices and a small decoder; and that gradients stay right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from networks import PLAIN, LinearClassifier
from tiny_pipelines import filled, qwen_pipe, randn, wan_pipe
from torch import nn

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, LatentDecoder
from diffusers_dmp.diffusion.latents import decode_latents


def image_vae(**config: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 2, "sample_size": 32}
    return filled(AutoencoderKL(**blocks, **sizes, **config), seed=0)


def tiny_vae() -> AutoencoderTiny:
    return filled(AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4), seed=0)


def checkpointed(vae: Any) -> None:
    vae.enable_gradient_checkpointing()


def tiled(vae: Any) -> None:
    vae.enable_tiling()
    for name in ("tile_sample_min_height", "tile_sample_min_width"):  # of Wan's and Qwen-Image's
        if hasattr(vae, name):
            setattr(vae, name, 16)
            setattr(vae, name.replace("min", "stride"), 12)
    if hasattr(vae, "tile_latent_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8


def sliced(vae: Any) -> None:
    vae.enable_slicing()


def tiled_and_checkpointed(vae: Any) -> None:
    tiled(vae)
    checkpointed(vae)


VAES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "AutoencoderKL": (image_vae, (2, 4, 16, 16)),
    "AutoencoderTiny": (tiny_vae, (2, 4, 16, 16)),
    "Wan": (lambda: wan_pipe(None).vae, (2, 16, 2, 4, 4)),
    "Qwen-Image": (lambda: qwen_pipe(None).vae, (2, 4, 1, 8, 8)),
}
SAME = [
    *(("AutoencoderKL", change) for change in (checkpointed, sliced)),
    *(("AutoencoderTiny", change) for change in (checkpointed, sliced)),
    *(("Wan", sliced), ("Qwen-Image", sliced)),
]
TILED = [
    *(("AutoencoderKL", change) for change in (tiled, tiled_and_checkpointed)),
    ("AutoencoderTiny", tiled),
    pytest.param("AutoencoderTiny", tiled_and_checkpointed, marks=pytest.mark.slow),
    *(
        pytest.param(name, tiled, marks=pytest.mark.slow) for name in ("Wan", "Qwen-Image")
    ),  # which have no checkpointing
]


def gradient(decoder: Callable, latents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """∂(a weighted sum of the pixels)/∂(the latents)."""
    leaf = latents.clone().requires_grad_()
    return torch.autograd.grad((decoder(leaf) * weights).sum(), leaf)[0]


@pytest.mark.parametrize(("name", "change"), SAME)
def test_gradients_stay_the_same(name, change):
    make, shape = VAES[name]
    vae, latents = make(), randn(*shape)
    weights = torch.randn_like(decode_latents(vae, latents))
    expected = gradient(lambda x: decode_latents(vae, x), latents, weights)
    change(vae)
    torch.testing.assert_close(gradient(lambda x: decode_latents(vae, x), latents, weights), expected)


@pytest.mark.parametrize(("name", "change"), TILED)
def test_gradients_through_tiles_are_those_of_the_image_of_tiles(name, change):
    """The derivative in the gradient's direction is its norm, up to what the VAEs compute in float32 by themselves."""
    make, shape = VAES[name]
    vae, latents = make().double(), randn(*shape).double()
    change(vae)
    with torch.no_grad():
        weights = torch.randn_like(decode_latents(vae, latents)).double()
    found = gradient(lambda x: decode_latents(vae, x), latents, weights)
    assert (found != 0).all()  # from every tile
    with torch.no_grad():
        step = 1e-3 * found / found.norm()
        ahead, behind = ((decode_latents(vae, each) * weights).sum() for each in (latents + step, latents - step))
    torch.testing.assert_close(found.norm(), (ahead - behind) / 2e-3, rtol=2e-2, atol=0)


@pytest.fixture
def meta_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import meta_memory

    return meta_memory


def peak_bytes(meta_memory: Any, vae: nn.Module, shape: tuple[int, ...]) -> int:
    """The most memory that the gradient through a guidance decoder takes."""
    decoder, memory = LatentDecoder(vae.to("meta")), meta_memory.MetaMemory()
    with memory:
        leaf = torch.empty(shape, device="meta").requires_grad_()
        torch.autograd.grad(decoder(leaf).sum(), leaf)
    return memory.peak_bytes


def test_checkpointing_saves_memory_in_guidance_and_tiles_save_more(meta_memory):
    shape, peaks = (1, 4, 24, 24), []
    for change in (lambda vae: None, checkpointed, tiled_and_checkpointed):
        vae = image_vae()
        change(vae)
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
        peaks.append(peak_bytes(meta_memory, vae, shape))
    assert peaks[1] < 0.8 * peaks[0]
    assert peaks[2] < 0.8 * peaks[1]


def test_the_estimated_memory_is_what_tensors_take(meta_memory):
    """On a pretended accelerator, which computes."""
    from benchmarks.pretended_accelerator import PretendedAccelerator

    vae = image_vae(mid_block_add_attention=False).requires_grad_(False)  # attention is computed in another way there
    latents, accelerator, memory = randn(1, 4, 16, 16), PretendedAccelerator(), meta_memory.MetaMemory()

    def differentiate(latents: torch.Tensor) -> None:
        latents.requires_grad_()
        torch.autograd.grad(vae.decode(latents).sample.sum(), latents)

    latents = accelerator.put(latents)
    accelerator.put(vae)
    before = accelerator.num_bytes
    with accelerator:
        differentiate(latents)
    vae = image_vae(mid_block_add_attention=False).requires_grad_(False).to("meta")
    with memory:
        differentiate(torch.empty(1, 4, 16, 16, device="meta"))
    assert memory.peak_bytes == pytest.approx(accelerator.peak_bytes - before, rel=0.05)


def test_a_decoder_that_gradients_do_not_go_through_is_refused():
    experts = GuidanceExperts(LinearClassifier(randn(10, 48)), **PLAIN, method="finetune", num_experts=1)
    scheduler = GuidedScheduler(DDIMScheduler(), experts, ClassTarget(3), decoder=torch.no_grad()(lambda x: x[:, :3]))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="no_grad"):
        scheduler.step(randn(1, 4, 4, 4), scheduler.timesteps[0], randn(1, 4, 4, 4))
