"""Learned variance, scaled latents, timesteps in range, and schedulers by short names."""

import pytest
import torch
from conftest import randomised
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)

from diffusers_dmp.diffusion.latents import (
    decode_latents,
    pack_latents,
    scale_latents,
    unpack_latents,
    unscale_latents,
    vae_downsampling,
)
from diffusers_dmp.diffusion.schedulers import SCHEDULERS, make_like
from diffusers_dmp.diffusion.timesteps import check_timesteps, check_train_timesteps
from diffusers_dmp.diffusion.variance import VARIANCE_TYPES, as_learned_range


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_a_converted_variance_means_the_same(variance_type):
    variance = torch.rand(2, 3, 4, 4)
    fraction = VARIANCE_TYPES[variance_type](variance)
    converted = as_learned_range(variance, variance_type)
    torch.testing.assert_close(VARIANCE_TYPES["learned_range"](converted), fraction)


@pytest.mark.parametrize("shift_factor", [None, 0.3])
def test_latents_are_decoded_as_they_were_before_they_were_scaled(shift_factor):
    vae = randomised(
        AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.5, shift_factor=shift_factor,
        )
    )  # fmt: skip
    latents = torch.randn(1, 4, 4, 4)
    scaled = scale_latents(vae, latents)
    torch.testing.assert_close(scaled, (latents - (shift_factor or 0)) * 0.5)
    with torch.no_grad():
        images = decode_latents(vae, scaled)
        torch.testing.assert_close(images, vae.decode(latents).sample, atol=1e-4, rtol=1e-4)
    assert images.shape[-1] == latents.shape[-1] * vae_downsampling(vae) == 8
    assert vae_downsampling(None) == 1


STATISTICS = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [0.5, 2.0, 1.0, 4.0]}


def video_vae(kind, **config):
    return kind(z_dim=4, base_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True], **config)


@pytest.mark.parametrize(
    "vae, downsampling, scale",
    [
        (video_vae(AutoencoderKLWan, scale_factor_spatial=4, **STATISTICS), 4, 1),
        (video_vae(AutoencoderKLQwenImage, **STATISTICS), 4, 1),
        (AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, scaling_factor=0.3, **STATISTICS), 1, 0.3),
    ],
    ids=["Wan", "Qwen-Image", "SDXL"],
)
@pytest.mark.parametrize("frames", [(), (2,)])
def test_latents_with_statistics_of_each_channel(vae, downsampling, scale, frames):
    latents = torch.randn(2, 4, *frames, 4, 4)
    scaled = scale_latents(vae, latents)
    for channel, (mean, std) in enumerate(zip(*STATISTICS.values())):
        torch.testing.assert_close(scaled[:, channel], (latents[:, channel] - mean) / std * scale)
    torch.testing.assert_close(unscale_latents(vae, scaled), latents)
    assert vae_downsampling(vae) == downsampling


def test_packed_latents():
    latents = torch.randn(2, 3, 4, 6)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack_latents(packed, 4, 6), latents)
    with pytest.raises(ValueError, match="even height and width, but got 3 x 6"):
        pack_latents(latents[:, :, :3])


@pytest.mark.parametrize("timesteps", [[0, 999], [0.0, 999.5, 1000.0], []])
def test_timesteps_within_the_schedule(timesteps):
    check_timesteps(torch.tensor(timesteps), 1000)


@pytest.mark.parametrize("timesteps", [[-1], [1000], [1000.5], [-0.5, 3.0]])
def test_refuses_timesteps_outside_the_schedule(timesteps):
    with pytest.raises(ValueError, match="within the 1000 training timesteps"):
        check_timesteps(torch.tensor(timesteps), 1000)


def test_does_not_read_timesteps_from_an_accelerator():
    check_timesteps(torch.tensor([5000], device="meta"), 1000)  # a device whose values cannot be read


def test_refuses_a_scheduler_of_another_schedule():
    check_train_timesteps(FlowMatchEulerDiscreteScheduler(), 1000)
    with pytest.raises(ValueError, match="the model's 500, but got a DDIMScheduler with 1000"):
        check_train_timesteps(DDIMScheduler(), 500)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_another_class_has_the_same_noise(name):
    scheduler = make_like(DDPMScheduler(beta_schedule="squaredcos_cap_v2"), SCHEDULERS[name])
    assert type(scheduler).__name__ == SCHEDULERS[name]
    torch.testing.assert_close(
        scheduler.alphas_cumprod, DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    )
    assert scheduler.config.timestep_spacing == type(scheduler)().config.timestep_spacing  # its own
