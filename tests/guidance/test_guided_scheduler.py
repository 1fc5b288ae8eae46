"""Guidance in the scheduler, for any pipeline."""

import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UnCLIPScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from networks import PLAIN, linear_experts, make_resnet
from tiny_pipelines import randn

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DiTModel,
    GuidanceExperts,
    GuidedScheduler,
    SNRSplitPipeline,
    respaced_timesteps,
)
from diffusers_dmp.diffusion.predictions import PREDICTION_TYPES, convert_prediction, noise_levels
from diffusers_dmp.pipelines.scheduling import prepare_scheduler

LABELS = [1, 3]


def make_unet(channels: int = 3, seed: int = 0) -> UNet2DModel:
    return randomised(
        UNet2DModel(8, channels, channels, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2, norm_num_groups=4, layers_per_block=1), seed,
    )  # fmt: skip


def guided(scheduler, target=None, **kwargs) -> GuidedScheduler:
    return GuidedScheduler(scheduler, linear_experts(), target or ClassTarget(LABELS), **kwargs)


def toy_noise(x_t: torch.Tensor) -> torch.Tensor:
    """The toy denoiser of the published guidance: ε = 0.6·x_t."""
    return 0.6 * x_t


def generate(pipeline: DiffusionPipeline, **kwargs) -> torch.Tensor:
    """Two images (B, H, W, C) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=4, generator=generator, output_type="np", **kwargs).images
    return torch.from_numpy(images)


def log_likelihood(images: torch.Tensor) -> float:
    """log p of the classes `LABELS`, in images (B, H, W, C) in [0, 1]."""
    logits = (images * 2 - 1).movedim(-1, 1).flatten(1) @ Vectors("diffusion")["guidance.W"].T
    return F.log_softmax(logits, -1)[range(2), LABELS].mean().item()


# Equality with the published code


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@torch.no_grad()
def test_published_ddim(kind):
    """25 steps with each prediction type; x̂0 is clipped before it is guided."""
    vectors = Vectors("diffusion")
    scheduler = guided(DDIMScheduler(prediction_type=kind), ClassTarget(vectors["guidance.y"]))
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == respaced_timesteps(1000, "ddim25")
    x_t = vectors["guidance.noise"]
    for t, alpha, sigma in zip(scheduler.timesteps, *noise_levels(scheduler)):
        prediction = convert_prediction(toy_noise(x_t), x_t, alpha, sigma, "epsilon", kind)
        x_t = scheduler.step(prediction, t, x_t).prev_sample
    assert_matches(x_t, vectors["guidance.ddim25.sample"])


@torch.no_grad()
def test_published_ddpm_mean():
    vectors = Vectors("diffusion")
    x_t = vectors["guidance.noise"]
    inner = DDPMScheduler(variance_type="learned_range")
    output = torch.cat([toy_noise(x_t), torch.zeros_like(x_t)], dim=1)
    scheduler = guided(inner, ClassTarget(vectors["guidance.y"]))
    for each in (inner, scheduler):
        each.set_timesteps(1000)
    step = scheduler.step(output, 300, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    sigma = (0.5 * inner._get_variance(300, predicted_variance=output[:, 3:])).exp()
    assert_matches(step - sigma * noise, vectors["guidance.ddpm_mean_t300"])


@torch.no_grad()
def test_rescale_to_mean():
    """μ + σ²·s·∇·‖μ‖/‖∇‖, with the norms of each sample."""
    inner = DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    x_t = torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    mean = inner.step(toy_noise(x_t), 500, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(0))
    variance = inner._get_variance(500)
    mean = mean - variance.sqrt() * noise
    scheduler = guided(inner, scale=20.0, rescale_to_mean=True)
    step = scheduler.step(toy_noise(x_t), 500, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    shift = (step - variance.sqrt() * noise - mean).flatten(1).norm(dim=1)
    torch.testing.assert_close(shift, 20 * variance * mean.flatten(1).norm(dim=1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@torch.no_grad()
def test_the_variance_is_that_of_the_noise_which_the_step_adds(kind):
    """μ + σ²·s·∇log p, where σ is read off two steps with other noise."""
    plain = DDPMScheduler(variance_type=kind, clip_sample=False)
    scheduler, x_t = guided(DDPMScheduler(variance_type=kind, clip_sample=False), scale=2.0), randn(2, 3, 8, 8)
    output = torch.cat(
        [toy_noise(x_t), 0.2 + 0.1 * randn(2, 3, 8, 8, seed=1).abs()][: 1 + kind.startswith("learned")], 1
    )

    def step(scheduler, seed: int) -> torch.Tensor:
        return scheduler.step(output, 500, x_t, generator=torch.Generator().manual_seed(seed)).prev_sample

    sigma = (step(plain, 0) - step(plain, 1)) / (randn(2, 3, 8, 8, seed=0) - randn(2, 3, 8, 8, seed=1))
    weight = Vectors("diffusion")["guidance.W"]
    probabilities = (x_t.flatten(1) @ weight.T).softmax(-1)
    gradient = ((F.one_hot(torch.tensor(LABELS), 5) - probabilities) @ weight).view_as(x_t)
    expected = sigma.square() * 2.0 * gradient
    torch.testing.assert_close(step(scheduler, 0) - step(plain, 0), expected, rtol=2e-2, atol=1e-4)


def test_zero_gradient():
    """A gradient of zero cannot be rescaled, and changes nothing."""
    scheduler = GuidedScheduler(
        DDPMScheduler(), linear_experts(torch.zeros(5, 192)), ClassTarget(1), rescale_to_mean=True
    )
    x_t = torch.randn(2, 3, 8, 8)
    steps = [
        each.step(toy_noise(x_t), 500, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        for each in (scheduler, DDPMScheduler())
    ]
    torch.testing.assert_close(*steps)


# Schedulers and pipelines


SOLVERS = [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler,
           EulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler, PNDMScheduler, UniPCMultistepScheduler]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda cls: cls.__name__)
def test_every_scheduler_moves_towards_the_target(solver):
    unclipped = {"clip_sample": False} if solver in (DDIMScheduler, DDPMScheduler, LCMScheduler) else {}
    pipeline = ClassConditionalPipeline(make_unet(), solver(prediction_type="epsilon", **unclipped))
    without = generate(pipeline)
    pipeline.scheduler = guided(pipeline.scheduler, scale=3.0)
    with_guidance = generate(pipeline)
    assert log_likelihood(with_guidance) > log_likelihood(without) + 0.1
    pipeline.scheduler.scale = 0.0
    torch.testing.assert_close(generate(pipeline), without, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("solver", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_all_prediction_types_give_the_same_images(solver):
    images = []
    for kind in PREDICTION_TYPES:
        unet = make_unet()
        unet.register_to_config(prediction_type="epsilon")  # the pipeline converts it for the scheduler
        pipeline = ClassConditionalPipeline(unet, solver(prediction_type=kind))
        pipeline.scheduler = guided(pipeline.scheduler, scale=2.0)
        images.append(generate(pipeline))
    torch.testing.assert_close(images[1], images[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(images[2], images[0], atol=1e-3, rtol=1e-3)


def test_in_pipelines_of_diffusers():
    for pipeline in (DDPMPipeline(make_unet(), DDPMScheduler()), DDIMPipeline(make_unet(), DDIMScheduler())):
        without = generate(pipeline)
        pipeline.scheduler = guided(pipeline.scheduler, scale=5.0)
        assert log_likelihood(generate(pipeline)) > log_likelihood(without) + 0.1


def test_in_a_split_pipeline():
    pipeline = SNRSplitPipeline([make_unet(seed=0), make_unet(seed=1)], DDIMScheduler(), [0.25])
    without = generate(pipeline)
    pipeline.scheduler = guided(pipeline.scheduler, scale=5.0)
    assert log_likelihood(generate(pipeline)) > log_likelihood(without) + 0.1


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_with_a_learned_variance(scheduler_class):
    """Together with classifier-free guidance. For a DPM-Solver, the pipeline guides `around` one without learned variance."""
    transformer = randomised(DiTModel(**TINY_CONFIG))
    pipeline = ClassConditionalPipeline(transformer, scheduler_class(variance_type="learned_range"))
    experts = linear_experts(torch.randn(5, 256, generator=torch.Generator().manual_seed(0)))
    experts.preprocess = torch.nn.Identity()
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, ClassTarget(1))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([1, 2], num_inference_steps=3, guidance_scale=1.5, output_type="latent").images
    assert images.shape == (2, 4, 8, 8) and images.isfinite().all()


def test_a_sample_does_not_depend_on_its_batch():
    pipeline = ClassConditionalPipeline(make_unet(), DDIMScheduler())
    noise = torch.randn(2, 3, 8, 8)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = guided(pipeline.scheduler)
    together = pipeline(batch_size=2, latents=noise, num_inference_steps=4, output_type="latent").images
    for i in range(2):
        pipeline.scheduler = guided(pipeline.scheduler.scheduler, ClassTarget(LABELS[i]))
        alone = pipeline(latents=noise[i : i + 1], num_inference_steps=4, output_type="latent").images
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_two_networks_at_once():
    """A guided scheduler around another one."""
    pipeline = ClassConditionalPipeline(make_unet(), DDIMScheduler(clip_sample=False))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.scheduler = guided(guided(pipeline.scheduler, scale=1.5), scale=0.5)
    pipeline.set_progress_bar_config(disable=True)
    both = pipeline(batch_size=2, latents=noise, num_inference_steps=3, output_type="latent").images
    pipeline.scheduler = guided(DDIMScheduler(clip_sample=False), scale=2.0)
    once = pipeline(batch_size=2, latents=noise, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(both, once, atol=1e-4, rtol=1e-3)


def test_the_order_of_two_networks_does_not_matter():
    """Each guides by its gradient at the x̂0 of the denoiser, not at one that the other has changed."""
    experts = [linear_experts(randn(5, 192, seed=seed)) for seed in (1, 2)]
    x_t, steps = randn(2, 3, 8, 8), []
    for first, second in (experts, experts[::-1]):
        settings = {"scale": 1.0, "decoder": torch.tanh}
        scheduler = GuidedScheduler(DDIMScheduler(clip_sample=False), first, ClassTarget(1), **settings)
        scheduler = GuidedScheduler(scheduler, second, ClassTarget(1), **settings)
        scheduler.set_timesteps(10)
        steps.append(scheduler.step(toy_noise(x_t), scheduler.timesteps[4], x_t).prev_sample)
    torch.testing.assert_close(*steps)


def test_a_vae_in_half_precision():
    """Gradients would underflow in half precision: the VAE is copied in float32."""
    vae = randomised(AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, sample_size=8))
    x_t, steps = torch.randn(2, 4, 8, 8), []
    for own in (vae, copy.deepcopy(vae).half()):
        scheduler = guided(DDIMScheduler(clip_sample=False), scale=1.0, vae=own)
        scheduler.set_timesteps(10)
        steps.append(scheduler.step(x_t, scheduler.timesteps[4], x_t).prev_sample)
    torch.testing.assert_close(steps[1], steps[0], atol=1e-2, rtol=1e-2)
    assert own.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Samples in half precision, gradients in float32."""
    scheduler = guided(DDIMScheduler(clip_sample=False), scale=2.0)
    exact = guided(DDIMScheduler(clip_sample=False), scale=2.0)
    x_t = torch.randn(2, 3, 8, 8)
    seen = []
    scheduler.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for each in (scheduler, exact):
        each.set_timesteps(10)
    step = scheduler.step(toy_noise(x_t).to(dtype), scheduler.timesteps[2], x_t.to(dtype)).prev_sample
    expected = exact.step(toy_noise(x_t), exact.timesteps[2], x_t).prev_sample
    assert step.dtype == dtype and seen == [torch.float32]
    torch.testing.assert_close(step.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_outside(context):
    """Up to rounding, as other kernels may run in inference mode."""
    scheduler, x_t = guided(DDIMScheduler()), torch.randn(2, 3, 8, 8)
    scheduler.set_timesteps(1000)
    expected = scheduler.step(toy_noise(x_t), 500, x_t).prev_sample
    with context():
        torch.testing.assert_close(scheduler.step(toy_noise(x_t.clone()), 500, x_t.clone()).prev_sample, expected)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_latents_are_guided_through_the_vae(kind):
    """∇ of log p(y | decode(x̂0)) with respect to x_t, where ε is constant."""
    vae = randomised(AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2, sample_size=8))
    scheduler = guided(DDIMScheduler(clip_sample=False, prediction_type=kind), scale=3.0, vae=vae)
    scheduler.set_timesteps(10)
    x_t, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), scheduler.timesteps[4]
    alpha, sigma = (level[4] for level in noise_levels(scheduler))
    step = scheduler.step(convert_prediction(noise, x_t, alpha, sigma, "epsilon", kind), t, x_t).prev_sample
    leaf = x_t.clone().requires_grad_()
    images = vae.decode((leaf - sigma * noise) / alpha / vae.config.scaling_factor).sample
    log_probs = F.log_softmax(images.flatten(1) @ Vectors("diffusion")["guidance.W"].T, -1)
    (gradient,) = torch.autograd.grad(log_probs[range(2), LABELS].sum(), leaf)
    plain = DDIMScheduler(clip_sample=False)
    plain.set_timesteps(10)
    expected = plain.step(noise - sigma * 3.0 * gradient, t, x_t).prev_sample
    torch.testing.assert_close(step, expected.detach(), atol=1e-4, rtol=1e-3)


# Which steps are guided


def guided_timesteps(scheduler: GuidedScheduler, num_inference_steps: int) -> list[int]:
    seen = []
    scheduler.experts.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    pipeline = ClassConditionalPipeline(make_unet(), scheduler.scheduler)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, num_inference_steps=num_inference_steps)
    return seen


def test_timestep_range():
    scheduler = guided(DDIMScheduler(), timestep_range=(300, 800))
    assert guided_timesteps(scheduler, 10) == [700, 600, 500, 400, 300]


def test_other_steps_are_those_of_the_scheduler():
    """They clip, also where x̂0 is far out of range, as at the first steps of a cosine schedule."""
    inner = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    pipeline = ClassConditionalPipeline(make_unet(), inner)
    without = generate(pipeline)
    pipeline.scheduler = guided(inner, timestep_range=(2000, 3000))
    torch.testing.assert_close(generate(pipeline), without)
    pipeline.scheduler = guided(inner, scale=5.0)
    assert log_likelihood(generate(pipeline)) > log_likelihood(without) + 0.1
    assert pipeline.scheduler.config.clip_sample


def test_experts_see_samples_as_the_denoiser_does():
    """Scaled, where Euler's are 1/α times larger; and of a step that begins in pure noise neither evaluation is guided."""
    for scheduler, first in ((EulerDiscreteScheduler(), 0), (FlowMatchHeunDiscreteScheduler(), 2)):
        scheduler, seen, expected = guided(scheduler, timestep_range=(0, 1001)), [], []
        scheduler.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        scheduler.set_timesteps(4)
        x_t = scheduler.init_noise_sigma * randn(2, 3, 8, 8) if first == 0 else randn(2, 3, 8, 8)
        for t in scheduler.timesteps:
            expected.append(scheduler.scale_model_input(x_t, t) if first == 0 else x_t)
            x_t = scheduler.step(toy_noise(expected[-1]), t, x_t).prev_sample
        assert len(seen) == len(expected) - first
        for images, sample in zip(seen, expected[first:]):
            torch.testing.assert_close(images, sample)


def test_every_other_step():
    assert guided_timesteps(guided(DDIMScheduler(), every=2), 6) == [830, 498, 166]


def test_both_evaluations_of_a_second_order_step():
    assert len(guided_timesteps(guided(HeunDiscreteScheduler(), every=2), 4)) == 4


@pytest.mark.parametrize(
    "solver", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_steps_of_pure_noise_are_not_guided(solver):
    """ᾱ = 0 at the first step, or the 2⁻²⁴ that some schedulers replace it by."""
    scheduler = solver(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    assert guided_timesteps(guided(scheduler), 4) == [749, 499, 249]


def test_timestep_range_of_a_second_order_scheduler():
    """Both evaluations of the steps that begin in it."""
    scheduler = guided(HeunDiscreteScheduler(timestep_spacing="trailing"), timestep_range=(300, 800))
    assert guided_timesteps(scheduler, 5) == [799, 599, 599, 399, 399, 199]


@pytest.mark.parametrize("solver", [DDIMScheduler, EulerDiscreteScheduler], ids=lambda cls: cls.__name__)
def test_every_other_step_from_a_later_beginning(solver):
    """As image-to-image pipelines begin, from the first step that they take."""
    scheduler = guided(solver(timestep_spacing="trailing"), every=2)
    seen = []
    scheduler.experts.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    for begin, expected in ((5, [499, 299, 99]), (6, [399, 199])):
        seen.clear()
        scheduler.set_timesteps(10)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x_t = torch.randn(2, 3, 8, 8)
        for t in scheduler.timesteps[begin:]:
            x_t = scheduler.step(toy_noise(scheduler.scale_model_input(x_t, t)), t, x_t).prev_sample
        assert seen == expected


def test_the_scheduler_of_unclip():
    """Which does not say of which order it is."""
    x_t, steps = randn(2, 3, 8, 8), []
    for scheduler in (UnCLIPScheduler(), guided(UnCLIPScheduler(), scale=0.0), guided(UnCLIPScheduler(), scale=3.0)):
        scheduler.set_timesteps(10)
        step = scheduler.step(toy_noise(x_t), scheduler.timesteps[4], x_t, generator=torch.Generator().manual_seed(0))
        steps.append(step.prev_sample)
    torch.testing.assert_close(steps[1], steps[0])
    assert log_likelihood((steps[2].movedim(1, -1) + 1) / 2) > log_likelihood((steps[0].movedim(1, -1) + 1) / 2)


# A subclass of the scheduler's class


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda cls: cls.__name__)
def test_type_and_isinstance_agree(solver):
    scheduler = guided(solver())
    assert isinstance(scheduler, solver) and isinstance(scheduler, GuidedScheduler)
    assert issubclass(type(scheduler), solver) and issubclass(type(scheduler), GuidedScheduler)
    assert scheduler.__class__ is type(scheduler) is type(guided(solver()))
    assert (type(scheduler).__module__, type(scheduler).__name__) == (solver.__module__, solver.__name__)
    assert type(scheduler).__qualname__ == f"GuidedScheduler[{solver.__name__}]"


def test_attributes_of_the_scheduler():
    inner = DDIMScheduler(num_train_timesteps=1000, beta_end=0.03)
    scheduler = guided(inner)
    assert scheduler.config == inner.config and scheduler.init_noise_sigma == 1 and scheduler.order == 1
    for method in ("step", "set_timesteps"):
        own, expected = (inspect.signature(getattr(each, method)).parameters for each in (scheduler, inner))
        assert list(own) == list(expected)
    scheduler.set_timesteps(7, "cpu")
    assert len(scheduler.timesteps) == 7
    assert len(scheduler) == 1000


def test_the_given_scheduler_does_not_change():
    inner = EulerDiscreteScheduler()
    inner.set_timesteps(5)
    scheduler = guided(inner)
    assert scheduler.scheduler is inner and len(scheduler.timesteps) == 5
    before = inner.timesteps
    scheduler.set_timesteps(3)
    x_t = torch.randn(2, 3, 8, 8)
    scheduler.step(toy_noise(x_t), scheduler.timesteps[0], x_t)
    scheduler.register_to_config(timestep_spacing="trailing")
    assert scheduler.step_index == 1 and inner.step_index is None and inner.timesteps is before
    assert inner.config.timestep_spacing == "linspace"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_copies(copied):
    scheduler = guided(guided(DDIMScheduler()))
    scheduler.set_timesteps(10)
    twin = copied(scheduler)
    assert type(twin) is type(scheduler)
    x_t, t = torch.randn(2, 3, 8, 8), scheduler.timesteps[4]
    step = twin.step(toy_noise(x_t), t, x_t).prev_sample
    assert torch.equal(step, scheduler.step(toy_noise(x_t), t, x_t).prev_sample)
    twin.scale = twin.scheduler.scale = 0
    assert scheduler.scale == scheduler.scheduler.scale == 7.5
    assert twin.scheduler is not scheduler.scheduler and twin.experts is not scheduler.experts


def test_other_schedulers_from_the_configuration():
    """Without guidance, which is no part of a configuration."""
    scheduler = guided(DDIMScheduler(beta_end=0.03))
    again = type(scheduler).from_config(scheduler.config, clip_sample=False)
    assert type(again) is DDIMScheduler
    assert again.config.beta_end == 0.03 and not again.config.clip_sample and scheduler.config.clip_sample
    assert DPMSolverMultistepScheduler.from_config(scheduler.config).config.beta_end == 0.03
    around = scheduler.around(again)
    assert isinstance(around, GuidedScheduler) and around.experts is scheduler.experts
    with pytest.raises(ValueError, match="a scheduler's class, but got that of GuidedScheduler"):
        GuidedScheduler.from_config(scheduler.config)


def test_guided_schedulers_in_one_another():
    """Each has its own settings, which can be changed; the state is that of the outermost one."""
    inner = guided(DDIMScheduler(clip_sample=False), ClassTarget(0), scale=1.0)
    outer = guided(inner, scale=2.0)
    assert type(outer) is type(inner) and outer.scheduler is inner
    outer.set_timesteps(10)
    x_t, t = torch.randn(2, 3, 8, 8), outer.timesteps[4]
    once = guided(DDIMScheduler(clip_sample=False), scale=3.0)
    once.set_timesteps(10)
    inner.target, outer.scheduler.scale = outer.target, 1.0
    expected = once.step(toy_noise(x_t), t, x_t).prev_sample
    torch.testing.assert_close(outer.step(toy_noise(x_t), t, x_t).prev_sample, expected, atol=1e-4, rtol=1e-3)


class HalvedScheduler(GuidedScheduler):
    """As users derive their own from it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale /= 2


def test_a_subclass():
    scheduler = HalvedScheduler(DDIMScheduler(), linear_experts(), ClassTarget(0), scale=4.0)
    assert isinstance(scheduler, HalvedScheduler) and isinstance(scheduler, DDIMScheduler) and scheduler.scale == 2
    assert isinstance(copy.deepcopy(scheduler), HalvedScheduler)


def test_one_target_for_two_networks():
    """Each guided scheduler looks the class up in its own network."""
    target = ClassTarget("LABEL_2")
    first = guided(DDIMScheduler(), target)
    renamed = linear_experts()
    renamed.network_config.id2label = {index: f"LABEL_{(index + 1) % 5}" for index in range(5)}
    second = GuidedScheduler(first, renamed, target)
    assert (first.target.indices.item(), second.target.indices.item()) == (2, 1)
    second.target = ClassTarget("LABEL_3")
    assert second.target.indices.item() == 2 and not hasattr(target, "indices")


def test_tuples_instead_of_outputs():
    scheduler, x_t = guided(DDPMScheduler()), torch.randn(2, 3, 8, 8)
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    output = scheduler.step(toy_noise(x_t), 500, x_t, generator=generators[0])
    by_name = scheduler.step(toy_noise(x_t), 500, x_t, generator=generators[1], return_dict=False)
    by_place = scheduler.step(toy_noise(x_t), 500, x_t, generators[2], False)
    assert torch.equal(by_name[0], output.prev_sample) and torch.equal(by_place[0], output.prev_sample)


@pytest.mark.parametrize("pipeline_class", [ClassConditionalPipeline, DDIMPipeline])
def test_a_guided_pipeline_is_saved_without_its_guidance(tmp_path, pipeline_class):
    pipeline = pipeline_class(make_unet(), DDIMScheduler(beta_end=0.03))
    pipeline.scheduler = guided(pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is DDIMScheduler and loaded.scheduler.config.beta_end == 0.03
    assert loaded.scheduler.config.clip_sample
    pipeline.scheduler.save_pretrained(tmp_path / "alone")
    assert type(DDIMScheduler.from_pretrained(tmp_path / "alone")) is DDIMScheduler
    assert type(type(pipeline.scheduler).from_pretrained(tmp_path / "alone")) is DDIMScheduler


def test_timesteps_stay_on_the_cpu():
    """On any device that a pipeline asks for, so that no step waits for an accelerator to know its timestep."""
    scheduler = guided(DDIMScheduler())
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "cpu"


# Bad input


@pytest.mark.parametrize(
    ("scheduler", "arguments", "message"),
    [
        (None, {}, "`scheduler` to be a scheduler of Diffusers, but got None"),
        (EDMEulerScheduler(), {}, "with other noise levels"),
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            {},
            "to count training timesteps.*, but got a EulerDiscreteScheduler, which has a time",
        ),
        (DDIMScheduler(num_train_timesteps=500), {}, "to be the model's 1000, but got a DDIMScheduler with 500"),
        (DDIMScheduler(), {"rescale_to_mean": True}, "a DDPMScheduler for `rescale_to_mean`"),
        (DDIMScheduler(), {"every": 0}, "`every` to be at least 1"),
        (
            DDIMScheduler(),
            {"decoder": lambda x0: x0, "vae": torch.nn.Identity()},
            "`decoder` or `vae`.*, but got both",
        ),
        (DDIMScheduler(), {"on_nonfinite": "stop"}, "one of raise, unguided, but got 'stop'"),
    ],
)
def test_arguments_that_do_not_fit(scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        guided(scheduler, **arguments)


@pytest.mark.parametrize("on_nonfinite", ["raise", "unguided"])
def test_nonfinite_gradients(on_nonfinite):
    inner = DDIMScheduler(clip_sample=False)
    scheduler = guided(inner, scale=float("inf"), timestep_range=(0, 500), on_nonfinite=on_nonfinite)
    pipeline = ClassConditionalPipeline(make_unet(), inner)
    expected = generate(pipeline)
    pipeline.scheduler = scheduler
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="at timestep 250, from expert 0"):
            generate(pipeline)
    else:
        torch.testing.assert_close(generate(pipeline), expected, atol=1e-5, rtol=1e-4)


def test_only_samples_whose_guidance_is_not_finite_stay_unguided():
    x_t, steps = randn(2, 3, 8, 8), []
    for factors in (None, [1.0, float("inf")], [1.0, 1.0]):
        scheduler = DDIMScheduler(clip_sample=False)
        if factors is not None:
            factors = torch.tensor(factors).view(2, 1, 1, 1)
            scheduler = guided(scheduler, decoder=lambda x0, factors=factors: factors * x0, on_nonfinite="unguided")
        scheduler.set_timesteps(10)
        steps.append(scheduler.step(toy_noise(x_t), scheduler.timesteps[4], x_t).prev_sample)
    unguided, found, finite = steps
    assert torch.equal(found[0], finite[0]) and not torch.allclose(found[0], unguided[0])
    assert torch.equal(found[1], unguided[1]) and not torch.allclose(finite[1], unguided[1])


def test_overflow_in_half_precision():
    """Guidance that is finite in float32, but not in the samples' dtype."""
    scheduler = guided(DDIMScheduler(clip_sample=False), scale=1e9, on_nonfinite="unguided")
    plain = DDIMScheduler(clip_sample=False)
    x_t = torch.randn(2, 3, 8, 8).half()
    for each in (scheduler, plain):
        each.set_timesteps(10)
    t = scheduler.timesteps[3]
    torch.testing.assert_close(
        scheduler.step(toy_noise(x_t), t, x_t).prev_sample, plain.step(toy_noise(x_t), t, x_t).prev_sample
    )
    scheduler = guided(DDIMScheduler(clip_sample=False), scale=1e9)
    scheduler.set_timesteps(2)
    scheduler.step(toy_noise(x_t), scheduler.timesteps[0], x_t)
    with pytest.raises(FloatingPointError, match="at timestep 500, from expert 0"):
        scheduler.step(toy_noise(x_t), scheduler.timesteps[1], x_t)


def test_a_timestep_that_was_not_set():
    scheduler = guided(DDIMScheduler())
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"`timestep` to be one of \[500, 0\], but got 3"):
        scheduler.step(torch.zeros(1, 3, 8, 8), 3, torch.zeros(1, 3, 8, 8))


def test_each_step_is_guided_by_the_expert_of_its_timestep():
    """A ResNet with an adapter per interval."""
    experts = GuidanceExperts(make_resnet(), **PLAIN)
    scheduler = GuidedScheduler(DDIMScheduler(), experts, ClassTarget(3))
    acting = []
    pipeline = ClassConditionalPipeline(make_unet(), DDIMScheduler())
    pipeline.scheduler = scheduler
    experts.experts.network.register_forward_pre_hook(lambda *_: acting.append(experts.experts.active))
    generate(pipeline)
    assert acting == [3, 2, 1, 0]


def test_experts_of_noisy_images_behind_a_decoder():
    """They see x̂0 there, which has no noise."""
    experts = GuidanceExperts(make_resnet(), **PLAIN, rank=2, noise_schedule={"beta_schedule": "linear"})
    with pytest.warns(UserWarning, match="trained on noisy images, but with a decoder they see clean ones"):
        GuidedScheduler(DDIMScheduler(), experts, ClassTarget(1), decoder=lambda x0: x0)


# Copies and settings


def test_a_copy_has_settings_of_its_own():
    inner = guided(DDIMScheduler(), scale=2.0)
    outer = guided(inner, scale=7.5)
    copied = copy.copy(outer)
    copied.scale, copied.every, copied.scheduler.scale = 1.0, 2, 3.0
    copied.set_timesteps(4)
    assert (outer.scale, outer.every, outer.scheduler.scale) == (7.5, 1, 2.0)
    assert copied.experts is outer.experts


@pytest.mark.parametrize("name, value", [("every", 0), ("on_nonfinite", "ignore"), ("rescale_to_mean", True)])
def test_settings_are_checked_when_they_change(name, value):
    scheduler = guided(DDIMScheduler())
    with pytest.raises(ValueError, match=f"Expected .*`{name}`"):
        setattr(scheduler, name, value)


def test_the_configuration_of_a_guided_scheduler_is_kept_where_it_is_replaced():
    """A learned variance is dropped for solvers that have none; what was set on the guided scheduler stays."""
    plain = DPMSolverMultistepScheduler(variance_type="learned_range", use_karras_sigmas=False)
    scheduler = guided(guided(plain, scale=2.0), scale=7.5)
    scheduler.register_to_config(use_karras_sigmas=True)
    model = randomised(DiTModel(**TINY_CONFIG))
    replaced, keeps_variance = prepare_scheduler(scheduler, [model])
    assert replaced.config.use_karras_sigmas and replaced.config.variance_type is None and not keeps_variance
    assert (replaced.scale, replaced.scheduler.scale) == (7.5, 2.0)


def test_experts_of_another_noise_schedule_guide_where_the_noise_is_the_same(tmp_path):
    """Made and loaded ones; the noise levels count, not the scheduler's class."""
    make_resnet().save_pretrained(tmp_path / "network")
    schedule = {"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02}
    made = GuidanceExperts(
        make_resnet(), **PLAIN, rank=2, base_model_name_or_path=str(tmp_path / "network"), noise_schedule=schedule
    )
    made.save_pretrained(tmp_path / "experts")
    x_t = torch.randn(2, 3, 8, 8)
    for experts in (made, GuidanceExperts.from_pretrained(tmp_path / "experts")):
        seen: list = []
        experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append((args[0], args[1].item())))
        same = GuidedScheduler(UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"), experts, ClassTarget(1))
        other = GuidedScheduler(DDIMScheduler(beta_start=1e-4, beta_end=0.02), experts, ClassTarget(1))
        for scheduler in (same, other):
            scheduler.set_timesteps(10)
            scheduler.step(toy_noise(x_t), scheduler.timesteps[4], x_t)
        (same_images, same_t), (other_images, other_t) = seen
        assert same_t == same.timesteps[4] and torch.equal(same_images, x_t)
        # ᾱ is 0.0778 at t = 500 of the linear schedule; the cosine one has that where cos² of the angle is
        levels = [each.alphas_cumprod.double() for each in (same, other)]
        low = int(other_t)
        assert levels[0][low + 1] <= levels[1][int(other.timesteps[4])] <= levels[0][low]
        torch.testing.assert_close(other_images, x_t)
