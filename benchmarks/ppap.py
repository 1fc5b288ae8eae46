"""PPAP on a ResNet-50: the memory of five experts compared with five copies of the network, and the cost of guidance."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler

from .patch import patched_unet
from .timing import Ratio, Settings, seconds

MEMORY_TARGET, GRADIENT_TARGET, STEP_TARGET, SWITCH_TARGET_MS = 0.26, 1.03, 1.05, 50.0
NUM_EXPERTS, RANK, IMAGE_SIZE = 5, 16, 224
PLAIN = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def call_all(*functions: Callable[[], object]) -> None:
    """Call several functions, to time them together."""
    for function in functions:
        function()


def num_bytes(module: nn.Module, *further: torch.Tensor) -> int:
    """Count the bytes of a module's parameters and buffers and of further tensors, each once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers(), *further)}
    return sum(tensor.nbytes for tensor in tensors.values())


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare gradients and denoising steps for each batch size, in float32 and not compiled; print memory and switching time."""
    device = settings.device
    bare = ResNetForImageClassification(ResNetConfig(num_labels=1000)).to(device).eval().requires_grad_(False)
    network = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    network.load_state_dict(bare.state_dict())
    experts = GuidanceExperts(network, **PLAIN, num_experts=NUM_EXPERTS, rank=RANK).to(device)
    expert_bytes = num_bytes(experts, *experts.expert_tensors().values())  # also of experts that are not active
    share = expert_bytes / (NUM_EXPERTS * num_bytes(bare))

    for batch_size in settings.batch_sizes:
        x_t = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        timestep, target = torch.tensor(700), ClassTarget(3)
        target.prepare(network.config)

        def gradient(forward, x_t=x_t, target=target):
            leaf = x_t.clone().requires_grad_()
            torch.autograd.grad(target.log_likelihood(forward(leaf)).sum(), leaf)

        # both normalise the images as the network needs it
        guided = partial(gradient, lambda images, timestep=timestep: experts(images, timestep))
        plain = partial(gradient, lambda images: bare(experts.preprocess(images)))
        case = f"ResNet-50 float32 batch {batch_size}"
        yield settings.compare(f"{case}, gradient: merged expert / bare network", guided, plain, GRADIENT_TARGET)

        unet = patched_unet(8).to(device).eval()
        scheduler = DDIMScheduler(prediction_type="sample")
        both = GuidedScheduler(scheduler, experts, target)
        for each in (scheduler, both):
            each.set_timesteps(50)

        @torch.no_grad()
        def step(scheduler, unet=unet, x_t=x_t):
            t = scheduler.timesteps[15]
            scheduler.step(unet(x_t, t).sample, t, x_t)

        parts = partial(call_all, partial(step, scheduler), plain)
        what = f"{case}, a step: guided / unguided and the network's gradient"
        yield settings.compare(what, partial(step, both), parts, STEP_TARGET)

    switches = []
    for switch in range(20):
        expert = switch % NUM_EXPERTS
        switches.append(1000 * seconds(partial(experts.experts.activate, expert, merged=True), device))
    switch_ms = statistics.median(switches)
    print(f"\nMemory of {NUM_EXPERTS} experts: {share:.3f} of {NUM_EXPERTS} copies' "
          f"(≤ {MEMORY_TARGET} {'✓' if share <= MEMORY_TARGET else '✗'}), "
          f"{expert_bytes / 2**20:.1f} MiB; of one expert alone "
          f"{sum(tensor.nbytes for tensor in experts.expert_tensors(0).values()) / 2**20:.2f} MiB")  # fmt: skip
    verdict = "✓" if switch_ms <= SWITCH_TARGET_MS else "✗"
    print(f"Switching experts: {switch_ms:.1f} ms (≤ {SWITCH_TARGET_MS:.0f} ms {verdict})")
