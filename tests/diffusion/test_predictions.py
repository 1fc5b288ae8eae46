"""Predictions of ε, x0 and v are the same information, and α and σ of a step are those that the scheduler uses."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dmp.diffusion.noise import alpha_sigma, noisy_sample
from diffusers_dmp.diffusion.predictions import (
    PREDICTION_TYPES,
    convert_prediction,
    noise_levels,
    posterior_weights,
    prediction_type_of,
    to_x0,
    velocity,
)
from diffusers_dmp.diffusion.timesteps import training_timesteps


@given(st.floats(0.01, 0.99), st.sampled_from(PREDICTION_TYPES), st.sampled_from(PREDICTION_TYPES))
def test_predictions_convert_into_one_another(alpha_cumprod, prediction_type, target_type):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.double) for _ in range(2))
    alpha, sigma = alpha_sigma(torch.tensor(alpha_cumprod, dtype=torch.double))
    x_t = noisy_sample(x0, noise, alpha, sigma)
    truth = {"sample": x0, "epsilon": noise, "v_prediction": velocity(x0, noise, alpha, sigma)}
    arguments = (truth[prediction_type], x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(convert_prediction(*arguments, target_type), truth[target_type])
    torch.testing.assert_close(to_x0(*arguments), x0)


def test_refuses_a_prediction_type_that_it_cannot_convert():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="of epsilon, sample, v_prediction, flow_prediction, but got 'score'"):
        convert_prediction(one, one, one, one, "sample", "score")
    assert convert_prediction(one, one, one, one, "score", "score") is one


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_flow_predictions_are_converted_both_ways(kind):
    """x_t = (1-σ)·x0 + σ·ε, v = ε - x0."""
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    levels, x_t = (1 - sigma, sigma), (1 - sigma) * x0 + sigma * noise
    right = {"epsilon": noise, "sample": x0}
    torch.testing.assert_close(convert_prediction(noise - x0, x_t, *levels, "flow_prediction", kind), right[kind])
    torch.testing.assert_close(convert_prediction(right[kind], x_t, *levels, kind, "flow_prediction"), noise - x0)
    torch.testing.assert_close(to_x0(noise - x0, x_t, *levels, "flow_prediction"), x0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x0_is_that_of_diffusers(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    prediction, x_t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    expected = scheduler.step(prediction, 500, x_t).pred_original_sample
    alpha, sigma = alpha_sigma(scheduler.alphas_cumprod[500])
    torch.testing.assert_close(to_x0(prediction, x_t, alpha, sigma, prediction_type), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("use_karras_sigmas", [False, True])
@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
def test_noise_levels_of_schedulers_with_sigmas(scheduler_class, use_karras_sigmas):
    """There `sigmas` is σ/α, and Euler's x_t is scaled by 1/α."""
    scheduler = scheduler_class(use_karras_sigmas=use_karras_sigmas)
    scheduler.set_timesteps(10)
    alpha, sigma = noise_levels(scheduler)
    assert len(alpha) == len(scheduler.timesteps) == 10
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(sigma / alpha, scheduler.sigmas[:10].double(), atol=0, rtol=1e-5)


@pytest.mark.parametrize("use_karras_sigmas", [False, True])
@pytest.mark.parametrize("scheduler_class", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, DPMSolverSDEScheduler])
def test_noise_levels_of_second_order_steps(scheduler_class, use_karras_sigmas):
    """The second evaluation is at the end of a step or in its middle; `scale_model_input` multiplies x_t by its α."""
    scheduler, found = scheduler_class(use_karras_sigmas=use_karras_sigmas), []
    scheduler.set_timesteps(6)
    x_t = torch.ones(1, 1, 8, 8)
    for t in scheduler.timesteps:
        found.append((scheduler.scale_model_input(x_t, t) / x_t).mean())
        x_t = scheduler.step(torch.ones_like(x_t), t, x_t).prev_sample
    torch.testing.assert_close(torch.stack(found).double(), noise_levels(scheduler)[0], atol=1e-4, rtol=1e-2)


def test_noise_levels_of_schedulers_with_integer_timesteps():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    alpha, sigma = noise_levels(scheduler)
    expected = alpha_sigma(scheduler.alphas_cumprod[scheduler.timesteps].double())
    torch.testing.assert_close((alpha, sigma), expected)


def test_noise_levels_at_pure_noise_and_between_timesteps():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    scheduler.timesteps = torch.tensor([999.0, 998.5, 0.5])
    alpha, sigma = noise_levels(scheduler)
    assert (alpha[0].item(), sigma[0].item()) == pytest.approx((0, 1), abs=1e-6)
    table = scheduler.alphas_cumprod.sqrt()
    assert table[999] < alpha[1] < table[998] and table[1] < alpha[2] < table[0]


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
    ],
    ids=["shift", "heun", "inverted", "unipc"],
)
def test_noise_levels_of_flow_matching(scheduler):
    """α + σ = 1 at each timestep; σ falls, also where the scheduler counts the other way round."""
    scheduler.set_timesteps(10)
    alpha, sigma = noise_levels(scheduler)
    assert len(alpha) == len(scheduler.timesteps) and (sigma.diff() <= 0).all()
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    torch.testing.assert_close(sigma * 1000, training_timesteps(scheduler, 1000).double(), atol=1, rtol=0)


def test_refuses_noise_levels_that_are_of_no_process():
    with pytest.raises(ValueError, match="a flow-matching one, but got a EDMEulerScheduler with other noise levels"):
        noise_levels(EDMEulerScheduler())
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, use_karras_sigmas=True, prediction_type="flow_prediction"
    )
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"σ of a flow-matching scheduler to be in \[0, 1\]"):
        noise_levels(scheduler)


def test_the_posterior_mean_is_that_of_diffusers():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    x0, x_t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    scheduler.set_timesteps(1000)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    step = scheduler.step(x0, 500, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    c0, ct = posterior_weights(scheduler.alphas_cumprod[500], scheduler.alphas_cumprod[499])
    mean = step - scheduler._get_variance(500).sqrt() * noise
    torch.testing.assert_close(c0 * x0 + ct * x_t, mean, atol=1e-5, rtol=1e-5)


def test_the_prediction_type_of_a_denoiser():
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    assert prediction_type_of(unet, DDIMScheduler(prediction_type="v_prediction")) == "v_prediction"
    assert prediction_type_of(unet, FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    unet.register_to_config(prediction_type="sample")
    assert prediction_type_of(unet, DDIMScheduler()) == "sample"
