"""A guided step compared with the sum of its parts: the unguided step, and forward and backward of decoder and vision network.

The denoiser is left out, which is the same in both: with it, the ratios are nearer to 1.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformers import ResNetConfig, ResNetForImageClassification

from diffusers_dmp import ClassTarget, GuidanceExperts, GuidedScheduler, LatentDecoder, VideoDecoder
from diffusers_dmp.diffusion.latents import decode_latents, unpack_latents

from .ppap import PLAIN, call_all
from .timing import Ratio, Settings, seconds

STEP_TARGET = 1.05
NUM_STEPS, FIRST_STEP = 50, 4  # flow matching is guided from σ < 0.95
LABEL = 3
RESNET: dict[str, Any] = {}  # transformers' defaults are those of ResNet-50
PIXELS = 128
# A quarter of the width of Stable Diffusion 3's VAE, and a sixth of Wan's
VAE = {"block_out_channels": (32, 64, 128, 128), "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 32}
WAN_VAE = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
FLOW, DIFFUSION = {"process": "flow_matching"}, {"beta_schedule": "linear"}


class Run:
    """
    The steps of a sampling run, one at each call, over and over.

    Args:
        scheduler ([`SchedulerMixin`]): The scheduler, guided or not.
        x_t (`torch.Tensor` of shape (B, …)): The noisy samples of all steps.
    """

    def __init__(self, scheduler: Any, x_t: torch.Tensor):
        self.scheduler, self.x_t = scheduler, x_t
        self.prediction = torch.randn_like(x_t)
        self.steps: Iterator[torch.Tensor] = iter(())

    @torch.no_grad()
    def __call__(self) -> None:
        timestep = next(self.steps, None)
        if timestep is None:
            self.scheduler.set_timesteps(NUM_STEPS, device=self.x_t.device)
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(FIRST_STEP)
            # without the last step, whose noise level is the least
            self.steps = iter(self.scheduler.timesteps[FIRST_STEP:-1])
            timestep = next(self.steps)
        self.scheduler.step(self.prediction, timestep, self.x_t)


def gradient(network: Any, preprocess: Callable, decode: Callable, x_t: torch.Tensor) -> None:
    """∇ log p of a class by hand: forward and backward of the bare network, and of the decoder."""
    leaf = x_t.clone().requires_grad_()
    images = decode(leaf)
    frames = images.flatten(0, 1) if images.ndim == 5 else images
    log_probs = network(preprocess(frames)).logits.log_softmax(1)
    torch.autograd.grad(log_probs[:, LABEL].sum(), leaf)


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare steps for each batch size, in float32 and not compiled; print what a switch of the expert takes."""
    device = settings.device
    bare = (
        ResNetForImageClassification(ResNetConfig(num_labels=1000, **RESNET)).to(device).eval().requires_grad_(False)
    )
    vae = AutoencoderKL(
        **VAE,
        down_block_types=["DownEncoderBlock2D"] * len(VAE["block_out_channels"]),
        up_block_types=["UpDecoderBlock2D"] * len(VAE["block_out_channels"]),
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae, wan_vae = (each.to(device).eval().requires_grad_(False) for each in (vae, AutoencoderKLWan(**WAN_VAE)))
    side = PIXELS // 2 ** (len(VAE["block_out_channels"]) - 1)
    unpacked = partial(unpack_latents, height=side, width=side)
    video = VideoDecoder(wan_vae, frames=[0, 4])
    same: Callable = lambda images: images  # noqa: E731
    unipc = partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True)

    cases: list[tuple[str, Callable, dict, tuple[int, ...], Any, Callable]] = [
        ("pixels, DDIM", DDIMScheduler, DIFFUSION, (3, PIXELS, PIXELS), None, same),
        ("pixels, DDPM", DDPMScheduler, DIFFUSION, (3, PIXELS, PIXELS), None, same),
        ("pixels, flow by diffusion's experts", FlowMatchEulerDiscreteScheduler, DIFFUSION, (3, PIXELS, PIXELS), None, same),
        (
            *("latents of an AutoencoderKL, flow", FlowMatchEulerDiscreteScheduler, FLOW, (16, side, side)),
            *(LatentDecoder(vae), partial(decode_latents, vae)),
        ),
        (
            *("packed latents, flow", FlowMatchEulerDiscreteScheduler, FLOW, ((side // 2) ** 2, 64)),
            LatentDecoder(vae, lambda vae, latents: decode_latents(vae, unpacked(latents))),
            lambda latents: decode_latents(vae, unpacked(latents)),
        ),
        (
            *("2 frames of a video by Wan's VAE, UniPC", unipc, FLOW, (16, 2, PIXELS // 8, PIXELS // 8)),
            *(video, partial(video.decode, wan_vae)),
        ),
    ]  # fmt: skip
    for batch_size in settings.batch_sizes:
        for name, make_scheduler, noise_schedule, shape, decoder, decode in cases:
            experts = make_experts(noise_schedule).to(device)
            x_t = torch.randn(batch_size, *shape, device=device)
            scheduler = GuidedScheduler(make_scheduler(), experts, ClassTarget(LABEL), decoder=decoder)
            by_hand = partial(gradient, bare, experts.preprocess, decode, x_t)
            parts = partial(call_all, Run(make_scheduler(), x_t), by_hand)
            yield settings.compare(f"{name}, batch {batch_size}", Run(scheduler, x_t), parts, STEP_TARGET)
            if name == cases[0][0]:
                twice = GuidedScheduler(scheduler, make_experts(noise_schedule).to(device), ClassTarget(LABEL))
                parts = partial(call_all, Run(make_scheduler(), x_t), by_hand, by_hand)
                yield settings.compare(
                    f"{name}, two networks, batch {batch_size}", Run(twice, x_t), parts, STEP_TARGET
                )

    print(f"\nSwitching experts: {switch_ms(make_experts(FLOW).to(device), settings):.1f} ms")


def make_experts(noise_schedule: dict[str, Any]) -> GuidanceExperts:
    """Five experts of rank 16 for noise of one kind."""
    network = ResNetForImageClassification(ResNetConfig(num_labels=1000, **RESNET))
    return GuidanceExperts(network, **PLAIN, num_experts=5, rank=16, noise_schedule=noise_schedule)


def switch_ms(experts: GuidanceExperts, settings: Settings) -> float:
    """The time from one expert to the next, in milliseconds."""
    times = [
        seconds(partial(experts.experts.activate, switch % 5, merged=True), settings.device, settings.clock)
        for switch in range(20)
    ]
    return 1e3 * statistics.median(times)
