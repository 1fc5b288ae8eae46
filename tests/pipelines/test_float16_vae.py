"""A float16 VAE whose activations overflow computes in float32 for as long as it has to, and is float16 again afterwards."""

import pytest
import torch
from conftest import randomised
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.hooks import apply_group_offloading
from networks import PLAIN, make_resnet
from small_pipelines import DIT

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DiTModel,
    GuidanceExperts,
    GuidedScheduler,
    SNRSplitPipeline,
)
from diffusers_dmp.diffusion.latents import decode_latents, upcast
from diffusers_dmp.training.data.latents import latent_distribution


def make_vae(dtype: torch.dtype, force_upcast: bool = True) -> AutoencoderKL:
    """A VAE with normal images and latents, but activations in between that are beyond float16."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = randomised(
        AutoencoderKL(
            block_out_channels=(4,), norm_num_groups=2, latent_channels=1, layers_per_block=1, force_upcast=force_upcast,
            **blocks,
        )
    )  # fmt: skip
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(10)
        for module in (vae.decoder, vae.encoder):
            module.conv_in.weight.mul_(2e5).clamp_(-6e4, 6e4)  # but sums beyond 65,504; the next layer normalises
    return vae.to(dtype)


def make_denoiser() -> DiTModel:
    return randomised(DiTModel(**DIT))


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1], num_inference_steps=2, output_type="pt", generator=generator).images


PIPELINES = [
    lambda vae: ClassConditionalPipeline(make_denoiser(), DDIMScheduler(), vae),
    lambda vae: SNRSplitPipeline([make_denoiser(), make_denoiser()], DDIMScheduler(), [1.0], vae),
]


@pytest.mark.parametrize("make", PIPELINES)
def test_images_are_those_of_float32(make):
    vae = make_vae(torch.float16)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    assert not vae.decode(torch.randn(1, 1, 8, 8).half()).sample.isfinite().all()  # or else this test shows nothing
    pipeline = make(vae)
    images = sample(pipeline)
    torch.testing.assert_close(images, sample(make(make_vae(torch.float16).float())))
    assert images.std() > 0.01 and pipeline.vae is vae
    assert all(weight.dtype == torch.float16 and torch.equal(weight, before[name])
               for name, weight in vae.state_dict().items())  # fmt: skip


def test_guidance_through_a_float16_vae():
    experts = GuidanceExperts(make_resnet(), **PLAIN, num_experts=2, base_model_name_or_path="resnet")
    pipeline = PIPELINES[0](make_vae(torch.float16))
    unguided = sample(pipeline)
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, ClassTarget(1), 5.0, vae=pipeline.vae)
    guided = sample(pipeline)
    assert guided.isfinite().all() and not torch.allclose(guided, unguided)
    assert pipeline.vae.dtype == torch.float16


def test_encoding():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    vae = make_vae(torch.float16)
    with torch.no_grad():
        mean, std = latent_distribution(vae, images)
        expected, expected_std = latent_distribution(make_vae(torch.float16).float(), images)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(std, expected_std)
    assert vae.dtype == torch.float16


@pytest.mark.parametrize(
    "dtype, force_upcast", [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_only_where_it_is_needed(dtype, force_upcast):
    vae = make_vae(dtype, force_upcast)
    with upcast(vae):
        assert vae.dtype == dtype


def test_restored_after_an_error():
    vae = make_vae(torch.float16)
    with pytest.raises(RuntimeError), torch.no_grad():
        decode_latents(vae, torch.randn(1, 3, 8, 8))  # three channels instead of one
    assert vae.dtype == torch.float16


@pytest.mark.group_offload
def test_a_vae_that_cannot_be_cast_says_so():
    vae = make_vae(torch.float16)
    apply_group_offloading(vae, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with torch.no_grad(), pytest.raises(ValueError, match=r"finite, but got others: its `force_upcast`.*offloaded"):
        decode_latents(vae, torch.randn(1, 1, 8, 8))
