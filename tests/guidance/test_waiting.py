"""A guided step never waits for an accelerator where the same step without guidance does not; seen on a pretended one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from networks import PLAIN, LinearClassifier, make_resnet
from tiny_pipelines import image_vae, qwen_pipe, randn, wan_pipe
from torch import nn

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, LatentDecoder, VideoDecoder

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "FlowMatchEuler": FlowMatchEulerDiscreteScheduler,
    "FlowMatchHeun": FlowMatchHeunDiscreteScheduler,
    "UniPC, flow": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "DPM++, flow": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "DDIM": DDIMScheduler,
    "DDIM, no clipping": lambda: DDIMScheduler(clip_sample=False),
    "DDPM": DDPMScheduler,
    "Heun": HeunDiscreteScheduler,
}
FLOW, DIFFUSION = {"process": "flow_matching"}, {"beta_schedule": "linear"}
FIRST = 3  # up to this step, what is asked for may be moved to the accelerator once


def put(accelerator: Any, module: nn.Module) -> None:
    """Move a module as `Module.to` does, which cannot: its parameters stay parameters."""
    with accelerator:
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    each._parameters[name] = nn.Parameter(accelerator.put(parameter), requires_grad=False)
            each._buffers.update({name: accelerator.put(buffer) for name, buffer in each._buffers.items()})


def guided(accelerator: Any, scheduler: Any, noise_schedule: dict = FLOW, pixels: int = 64, **settings: Any) -> Any:
    """Guided by three linear experts, which take turns."""
    network = LinearClassifier(randn(10, 3 * pixels))
    experts = GuidanceExperts(network, **PLAIN, method="multi_experts", num_experts=3, noise_schedule=noise_schedule)
    scheduler = GuidedScheduler(scheduler, experts, ClassTarget([1, 3]), **settings)
    put(accelerator, experts)
    return scheduler


@torch.no_grad()
def waits(accelerator: Any, scheduler: Any, shape: tuple[int, ...] = (2, 3, 8, 8)) -> list[list[str]]:
    """What the CPU waits for in each of a scheduler's steps."""
    sample, output, found = accelerator.put(randn(*shape)), accelerator.put(randn(*shape, seed=1)), []
    with accelerator:
        # schedulers that look at `timesteps` at every step wait for them, but not when they are guided
        scheduler.set_timesteps(6, device=sample.device if hasattr(scheduler, "step_index") else "cpu")
        for timestep in scheduler.timesteps:
            accelerator.waits.clear()
            sample = scheduler.step(output, timestep, sample).prev_sample
            found.append(list(accelerator.waits))
    return found


def check(accelerator: Any, scheduler: Any, shape: tuple[int, ...] = (2, 3, 8, 8)) -> None:
    """No step waits more often than the same step without guidance; the last one may, to tell what was not finite."""
    unguided = waits(accelerator, scheduler.unguided_class.from_config(scheduler.config), shape)
    with_guidance = waits(accelerator, scheduler, shape)
    for index in range(FIRST, len(unguided) - 1):
        assert len(with_guidance[index]) <= len(unguided[index]), (index, with_guidance[index])
    assert len(with_guidance[-1]) <= len(unguided[-1]) + (scheduler.on_nonfinite == "raise")


@pytest.mark.parametrize("noise_schedule", [FLOW, DIFFUSION], ids=["flow experts", "diffusion experts"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_guided_step_waits_no_more_than_the_unguided_one(accelerator, name, noise_schedule):
    check(accelerator, guided(accelerator, SCHEDULERS[name](), noise_schedule))


def test_nor_where_adapters_take_turns(accelerator):
    experts = GuidanceExperts(make_resnet(depths=[1, 1]), **PLAIN, num_experts=3, rank=2, noise_schedule=FLOW)
    scheduler = GuidedScheduler(FlowMatchEulerDiscreteScheduler(), experts, ClassTarget([1, 3]))
    put(accelerator, experts)
    with accelerator:  # also what belongs to those that are not active
        for tensors in experts.experts.stored:
            for name, tensor in tensors.items():
                there = accelerator.put(tensor)
                tensors[name] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    check(accelerator, scheduler)


@pytest.mark.parametrize(
    "settings",
    [{"every": 2}, {"timestep_range": (100, 700)}, {"on_nonfinite": "unguided"}, {"rescale_to_mean": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_nor_with_any_setting(accelerator, settings):
    for name in ("FlowMatchEuler", "DDPM"):
        if name == "DDPM" or "rescale_to_mean" not in settings:
            check(accelerator, guided(accelerator, SCHEDULERS[name](), **settings))


def test_nor_does_guidance_by_two_networks(accelerator):
    inner = guided(accelerator, FlowMatchEulerDiscreteScheduler(), on_nonfinite="unguided")
    check(accelerator, guided(accelerator, inner, DIFFUSION))


def test_nor_where_the_scheduler_has_its_noise_levels_there(accelerator):
    """As after `add_noise`, with which image-to-image pipelines begin."""
    scheduler = guided(accelerator, DDIMScheduler(), DIFFUSION)
    scheduler.alphas_cumprod = accelerator.put(scheduler.alphas_cumprod)
    found = waits(accelerator, scheduler)
    assert not any(found[1:-1])


def image_decoder() -> Any:
    return LatentDecoder(image_vae(4)), (2, 4, 8, 8), 64


def qwen_decoder() -> Any:
    decoder = LatentDecoder(qwen_pipe(None).vae, lambda vae, latents: vae.decode(latents[:, :, None]).sample[:, :, 0])
    return decoder, (2, 4, 2, 2), 64


def video_decoder() -> Any:
    vae = wan_pipe(None).vae
    return VideoDecoder(vae, frames=[0, 4]), (2, 16, 2, 2, 2), 256


@pytest.mark.parametrize("make", [image_decoder, qwen_decoder, video_decoder])
def test_nor_does_decoding(accelerator, make):
    decoder, shape, pixels = make()
    scheduler = guided(accelerator, FlowMatchEulerDiscreteScheduler(), pixels=pixels, decoder=decoder)
    put(accelerator, decoder.vae)
    check(accelerator, scheduler, shape)


def test_a_wait_would_be_seen(accelerator):
    """A decoder that looks at its images."""

    def decode(latents: torch.Tensor) -> torch.Tensor:
        assert latents.abs().max() >= 0
        return latents

    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        check(accelerator, guided(accelerator, FlowMatchEulerDiscreteScheduler(), decoder=decode))
