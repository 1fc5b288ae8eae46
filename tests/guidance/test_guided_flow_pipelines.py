"""Guided flow matching in this package's pipelines, settings that change between calls, and what is refused."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Vectors
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeliosScheduler,
    UniPCMultistepScheduler,
)
from networks import PLAIN, linear_experts, make_resnet
from test_guided_scheduler import make_unet
from tiny_sentences import sentence_pipe

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    GuidanceExperts,
    GuidanceTarget,
    GuidedScheduler,
    SNRSplitPipeline,
)

FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LABELS = [1, 3]
SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(),
    FlowMatchLCMScheduler(),
    UniPCMultistepScheduler(**FLOW_SIGMAS),
    DPMSolverMultistepScheduler(**FLOW_SIGMAS),
]


def guided(scheduler: Any, **settings: Any) -> GuidedScheduler:
    return GuidedScheduler(scheduler, linear_experts(), ClassTarget(LABELS), **settings)


def flow_unet(seed: int = 0) -> Any:
    unet = make_unet(seed=seed)
    unet.register_to_config(prediction_type="flow_prediction")
    return unet


def class_pipe() -> ClassConditionalPipeline:
    return ClassConditionalPipeline(flow_unet(), FlowMatchEulerDiscreteScheduler())


def split_pipe() -> SNRSplitPipeline:
    return SNRSplitPipeline([flow_unet(0), flow_unet(1)], FlowMatchEulerDiscreteScheduler(), [0.25])


PIPES = {"class": class_pipe, "split": split_pipe, "sentences": sentence_pipe}


def generate(pipe: Any, steps: int = 5) -> torch.Tensor:
    """Two samples (B, C, H, W), always from the same noise."""
    what = {"prompt": ["a dress", "a photo"]} if "prompt" in type(pipe).__call__.__annotations__ else {"batch_size": 2}
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**what, num_inference_steps=steps, generator=generator, output_type="latent").images


def log_likelihood(samples: torch.Tensor) -> float:
    """log p of the classes `LABELS`, grey images having three equal channels."""
    logits = samples.expand(-1, 3, -1, -1).flatten(1) @ Vectors("diffusion")["guidance.W"].T
    return F.log_softmax(logits, -1)[range(2), LABELS].mean().item()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("class", scheduler) for scheduler in SCHEDULERS]
    + [(name, SCHEDULERS[index]) for name in ("split", "sentences") for index in (0, 3)],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_guidance_moves_samples_towards_the_target_and_scale_0_does_not(name, scheduler):
    pipe = PIPES[name]()
    pipe.scheduler = scheduler
    without = generate(pipe)
    pipe.scheduler = guided(scheduler, scale=0.0)
    assert torch.equal(generate(pipe), without)  # the same computation, with nothing added
    pipe.scheduler.scale = 3.0
    assert log_likelihood(generate(pipe)) > log_likelihood(without) + 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Samples in half precision, gradients in float32."""
    steps = []
    for each in (torch.float32, dtype):
        scheduler = guided(FlowMatchEulerDiscreteScheduler(), scale=2.0)
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(each)
        steps.append(scheduler.step(0.6 * x_t, scheduler.timesteps[4], x_t).prev_sample)
    assert steps[1].dtype == dtype
    torch.testing.assert_close(steps[1].float(), steps[0], atol=0.05, rtol=0.05)


# Settings that change between calls


def test_what_is_changed_between_calls_counts_in_the_next_one():
    pipe = class_pipe()
    without = generate(pipe)
    pipe.scheduler = guided(pipe.scheduler, scale=3.0)
    first = generate(pipe)
    pipe.scheduler.target = ClassTarget([0, 0])
    assert not torch.allclose(generate(pipe), first, atol=1e-3)
    pipe.scheduler.target = ClassTarget(LABELS)
    assert torch.equal(generate(pipe), first)
    pipe.scheduler.timestep_range = (0, 300)
    assert not torch.allclose(generate(pipe), first, atol=1e-3)
    pipe.scheduler.timestep_range = None
    pipe.scheduler.experts = linear_experts(torch.zeros(5, 192))
    assert torch.equal(generate(pipe), without)


def test_other_experts_are_prepared_and_checked_as_the_first_ones():
    scheduler = guided(FlowMatchEulerDiscreteScheduler())
    scheduler.target = ClassTarget("LABEL_2")
    renamed = linear_experts().double().train()
    renamed.network_config.id2label = {index: f"LABEL_{(index + 1) % 5}" for index in range(5)}
    scheduler.experts = renamed
    assert scheduler.target.indices.item() == 1 and not renamed.training
    with pytest.raises(ValueError, match="experts that know which noise they were trained on"):
        scheduler.experts = GuidanceExperts(make_resnet(), **PLAIN)


def test_a_copy_and_the_same_guidance_around_another_scheduler():
    scheduler = guided(FlowMatchEulerDiscreteScheduler(), scale=2.0)
    scheduler.set_timesteps(4)
    copied, around = copy.copy(scheduler), scheduler.around(UniPCMultistepScheduler(**FLOW_SIGMAS))
    copied.scale, around.timestep_range = 1.0, (0, 500)
    assert (scheduler.scale, scheduler.timestep_range) == (2.0, (0, 500))
    copied.set_timesteps(3)
    assert len(scheduler._steps().timesteps) == 4 and len(copied._steps().timesteps) == 3


def test_a_guided_scheduler_is_freed_as_soon_as_it_is_replaced():
    """With experts and VAE, which may take gigabytes."""
    pipe = class_pipe()
    pipe.scheduler = guided(pipe.scheduler)
    generate(pipe)
    experts = weakref.ref(pipe.scheduler.experts)
    gc.disable()
    try:
        pipe.scheduler = pipe.scheduler.scheduler
        assert experts() is None
    finally:
        gc.enable()


def test_steps_of_pure_noise_and_of_no_noise_are_not_guided():
    """By default none above σ = 0.95 either; a schedule may end with a step at σ = 0."""
    for timestep_range, expected in ((None, [900.0, 300.0]), ((0, 1001), [970.0, 900.0, 300.0])):
        scheduler, seen = guided(FlowMatchEulerDiscreteScheduler(), timestep_range=timestep_range), []
        scheduler.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(round(float(args[1]))))
        scheduler.set_timesteps(sigmas=[1.0, 0.97, 0.9, 0.3, 0.0])
        x_t = torch.randn(2, 3, 8, 8)
        for t in scheduler.timesteps:
            x_t = scheduler.step(0.6 * x_t, t, x_t).prev_sample
        assert seen == expected and x_t.isfinite().all()


def test_timesteps_that_are_set_by_hand():
    """They count, and not those that `set_timesteps` has made before."""
    levels, steps = torch.tensor([0.9, 0.5, 0.2]), []
    for by_hand in (False, True):
        scheduler = guided(FlowMatchEulerDiscreteScheduler(), scale=2.0)
        scheduler.set_timesteps(sigmas=[0.7, 0.6, 0.1] if by_hand else levels.tolist())
        if by_hand:
            scheduler.sigmas, scheduler.timesteps = torch.cat([levels, torch.zeros(1)]), 1000 * levels
        x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x_t = scheduler.step(0.6 * x_t, t, x_t).prev_sample
        steps.append(x_t)
    torch.testing.assert_close(*steps)


# Bad input


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (DDIMInverseScheduler(), {}, "from noise to images, but got a DDIMInverseScheduler, which goes back"),
        (DPMSolverMultistepInverseScheduler(), {}, "DPMSolverMultistepInverseScheduler, which goes back"),
        (CogVideoXDPMScheduler(), {}, "from a prediction, a timestep and a sample.* a CogVideoXDPMScheduler"),
        (HeliosScheduler(), {}, "to an image of one size, but got a HeliosScheduler"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), {}, "to be one of flow_prediction, but got 'epsilon'"),
        (FlowMatchEulerDiscreteScheduler(), {"rescale_to_mean": True}, "a DDPMScheduler for `rescale_to_mean`"),
        (FlowMatchEulerDiscreteScheduler(), {"timestep_range": (800, 300)}, r"0 <= low < high.*got \(800, 300\)"),
        (FlowMatchEulerDiscreteScheduler(), {"timestep_range": (0, 0.9)}, r"t = σ·T.* but got \(0, 0.9\)"),
        (DDIMScheduler(), {"timestep_range": 500}, "two training timesteps.*, but got 500"),
        (DDIMScheduler(), {"scale": "7.5"}, "`scale` to be a number, but got '7.5'"),
    ],
)
def test_arguments_that_do_not_fit(scheduler, settings, message):
    with pytest.raises(ValueError, match=message):
        guided(scheduler, **settings)


@pytest.mark.parametrize("setting", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_noise_levels_that_are_not_those_of_flow_matching(setting):
    """Such a scheduler would step from σ = 157 on, in the way of flow matching."""
    scheduler = guided(DPMSolverMultistepScheduler(**FLOW_SIGMAS, **{setting: True}))
    with pytest.raises(ValueError, match=r"σ of a flow-matching scheduler to be in \[0, 1\]"):
        scheduler.set_timesteps(10)


def test_experts_that_do_not_know_their_noise():
    """A single one, as a classifier of clean images, needs not know."""
    with pytest.raises(ValueError, match="for a FlowMatchEulerDiscreteScheduler, but got 5 without `noise_schedule`"):
        GuidedScheduler(FlowMatchEulerDiscreteScheduler(), GuidanceExperts(make_resnet(), **PLAIN), ClassTarget(1))
    guided(FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)).set_timesteps(sigmas=[1.0, 0.5])


def first_step(scheduler: GuidedScheduler, x_t: torch.Tensor, *arguments: Any) -> None:
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    scheduler.step(x_t, scheduler.timesteps[2], x_t, *arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 64), r"the shape \(2, 16, 64\). Latents need a `decoder`"),
        ((2, 4, 8, 8), r"of 3 channels, but got the shape \(2, 4, 8, 8\)"),
        ((2, 16, 3, 8, 8), r"of 3 channels, but got the shape \(2, 3, 16, 8, 8\)"),
    ],
)
def test_samples_that_the_experts_cannot_see(shape, message):
    with pytest.raises(ValueError, match=message):
        first_step(guided(FlowMatchEulerDiscreteScheduler()), torch.zeros(shape))


class MeanTarget(GuidanceTarget):
    """Not for each image, as it should be."""

    def log_likelihood(self, output):
        return output.logits.mean()


@pytest.mark.parametrize(
    ("target", "decoder", "message"),
    [
        (MeanTarget(), None, r"of a MeanTarget to have the shape \(2,\), a number for each image, but got \(\)"),
        (ClassTarget(1), torch.no_grad()(lambda latents: latents + 0), "to depend on the samples.*torch.no_grad"),
        (ClassTarget(1), lambda latents: latents[:, :2], r"of 3 channels, but got the shape \(2, 2, 8, 8\)"),
    ],
)
def test_targets_and_decoders_that_do_not_fit(target, decoder, message):
    scheduler = GuidedScheduler(FlowMatchEulerDiscreteScheduler(), linear_experts(), target, decoder=decoder)
    with pytest.raises(ValueError, match=message):
        first_step(scheduler, torch.zeros(2, 3, 8, 8))


def test_images_of_another_size_than_the_experts_were_trained_on():
    experts = linear_experts()
    experts.register_to_config(sample_size=[8, 8])
    scheduler = GuidedScheduler(FlowMatchEulerDiscreteScheduler(), experts, ClassTarget(1))
    first_step(scheduler, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="of 8 x 8 pixels, on which .* trained, but got 16 x 8"):
        first_step(scheduler, torch.zeros(2, 3, 16, 8))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_timestep_for_each_token(by_name):
    scheduler, x_t = guided(FlowMatchEulerDiscreteScheduler()), torch.zeros(2, 3, 8, 8)
    tokens = torch.full((2, 8), 500.0)
    with pytest.raises(ValueError, match="one timestep for the whole of a sample, but got `per_token_timesteps`"):
        if by_name:
            scheduler.set_timesteps(4)
            scheduler.step(x_t, scheduler.timesteps[2], x_t, per_token_timesteps=tokens)
        else:
            first_step(scheduler, x_t, 0.0, 0.0, float("inf"), 1.0, None, tokens)


def test_no_step_is_guided():
    """As with one step from pure noise, which is all that some distilled models take."""
    scheduler = guided(FlowMatchEulerDiscreteScheduler())
    with pytest.warns(UserWarning, match=r"None of the 1 steps is guided.* `timestep_range` is \(0.0, 950.0\)"):
        scheduler.set_timesteps(sigmas=[1.0])


@pytest.mark.parametrize("on_nonfinite", ["raise", "unguided"])
def test_nonfinite_gradients(on_nonfinite):
    """The step is named as the scheduler counts it, and the expert as it was trained: σ/α = 1 is t = 259 of a linear schedule."""
    experts = GuidanceExperts(
        make_resnet(), **PLAIN, num_experts=4, noise_schedule={"beta_schedule": "linear", "beta_end": 0.02}
    )
    pipe = class_pipe()
    expected = generate(pipe, steps=3)
    settings = {"scale": float("inf"), "timestep_range": (400, 600), "on_nonfinite": on_nonfinite}
    pipe.scheduler = GuidedScheduler(FlowMatchEulerDiscreteScheduler(), experts, ClassTarget(1), **settings)
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="at timestep 500.*, from expert 1"):
            generate(pipe, steps=3)
    else:
        assert torch.equal(generate(pipe, steps=3), expected)
