"""Depth guidance of the real `IFPipeline` with tiny, random components."""

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from midas import make_midas, published_midas
from networks import PLAIN, make_dpt, randomised

from diffusers_dmp import DepthTarget, GuidanceExperts, GuidedScheduler, convert_checkpoint

EMBEDS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pipeline() -> IFPipeline:
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=6, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift", attention_head_dim=8, cross_attention_dim=16, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
    )  # fmt: skip
    unet = randomised(unet)
    # without tokenizer and text encoder: the prompts are encoded
    pipeline = IFPipeline(None, None, unet, scheduler, None, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: IFPipeline, guidance_scale: float = 7.0) -> torch.Tensor:
    return pipeline(
        prompt_embeds=EMBEDS,
        negative_prompt_embeds=torch.zeros_like(EMBEDS),
        num_inference_steps=8,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def published_experts() -> GuidanceExperts:
    checkpoints = [published_midas(make_midas(), seed=1)] * 5
    return convert_checkpoint("ppap", checkpoints, {"image_size": 32}, network=make_midas())


@torch.no_grad()
@pytest.mark.parametrize(
    ("make_experts", "guidance_scale", "share"),
    [
        pytest.param(lambda: GuidanceExperts(make_dpt(), **PLAIN), 1.0, 0.6, marks=pytest.mark.slow),
        (lambda: GuidanceExperts(make_dpt(), **PLAIN), 7.0, 0.6),
        (published_experts, 1.0, 0.9),
    ],
    ids=["DPT", "DPT, classifier-free guidance", "MiDaS"],
)
def test_depth_is_what_was_asked_for(pipeline, make_experts, guidance_scale, share):
    experts = make_experts()
    gradient_of_grey = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    depth = experts(gradient_of_grey, torch.tensor(0)).predicted_depth
    target = DepthTarget(depth)

    def error(images: torch.Tensor) -> torch.Tensor:
        return -target.log_likelihood(experts(images, torch.tensor(0)))

    without = generate(pipeline, guidance_scale)
    pipeline.scheduler = GuidedScheduler(pipeline.scheduler, experts, target, scale=0.5, rescale_to_mean=True)
    guided = generate(pipeline, guidance_scale)
    assert guided.shape == (2, 3, 32, 32) and guided.isfinite().all()
    assert (error(guided) < share * error(without)).all()
    assert not guided.requires_grad
