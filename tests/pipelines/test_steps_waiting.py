"""No denoising step of this package's pipelines waits for an accelerator but where Diffusers' scheduler does; seen on a pretended one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from exact_denoisers import TABLE, scheduler_classes
from networks import PLAIN, LinearClassifier
from tiny_pipelines import filled, randn, seeded
from tiny_sentences import sentence_pipe, transformer
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    GuidedScheduler,
    NoiseIntervals,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
)

STEPS = 5


def make_prompted() -> nn.Module:
    model = randomised(DiTModel(**TINY_CONFIG))
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


def make_patched_unet() -> nn.Module:
    return randomised(
        PatchedUNet2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            model_channels=32,
            channel_multipliers=(1,),
            layers_per_block=1,
            attention_levels=(0,),
            attention_head_dim=16,
            num_classes=10,
        )
    )


def make_stock_dit() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 10}
    return filled(DiTTransformer2DModel(in_channels=4, out_channels=8, sample_size=8, **sizes), 0)


def make_stock_unet() -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    return filled(UNet2DModel(**blocks, **sizes, num_class_embeds=10), 0)


SYSTEMS: dict[str, Callable[[], Any]] = {
    "DiT": lambda: randomised(DiTModel(**TINY_CONFIG)),
    "DTR": lambda: randomised(DTRTransformer2DModel(**TINY_CONFIG)),
    "Remix-DiT": lambda: randomised(RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7)),
    "DMP": make_prompted,
    "Patch Diffusion": make_patched_unet,
    "Diffusers' DiT": make_stock_dit,
    "Diffusers' UNet": make_stock_unet,
}


def waits(accelerator: Any, pipe: Any, steps: int = STEPS, **call: Any) -> list[int]:
    """How often the CPU waits in each step but the first."""
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            accelerator.put(component)
    ends: list[int] = []

    def count(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        ends.append(len(accelerator.waits))
        return {}

    if getattr(pipe, "num_classes", None) is not None:
        call = {"class_labels": [1, 3]} | call
        call |= {"guidance_scale": 1.5} if pipe.has_null_class else {}
    call = {"generator": accelerator.generator()} | call
    with accelerator:
        pipe(num_inference_steps=steps, output_type="latent", callback_on_step_end=count, **call)
    return [end - begin for begin, end in zip(ends, ends[1:])]


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_step_of_a_system_waits(accelerator, system):
    """Of those with experts, most steps are made by another expert than the one before."""
    assert not any(waits(accelerator, ClassConditionalPipeline(SYSTEMS[system](), DDIMScheduler())))


@pytest.mark.parametrize("system", ["DiT", "Remix-DiT", "Diffusers' DiT"])
def test_a_learned_variance_waits_for_the_noise_alone(accelerator, system):
    """If it is random numbers of the CPU, which are moved."""
    pipe = ClassConditionalPipeline(SYSTEMS[system](), DDPMScheduler(variance_type="learned_range"))
    assert not any(waits(accelerator, pipe))
    assert waits(accelerator, pipe, generator=seeded()) == [1] * (STEPS - 2) + [0]


def test_a_conversion_of_predictions_does_not_wait(accelerator):
    model = SYSTEMS["DTR"]()
    model.register_to_config(prediction_type="v_prediction")
    assert not any(waits(accelerator, ClassConditionalPipeline(model, DDIMScheduler())))


def test_several_denoisers_do_not_wait_where_they_take_turns(accelerator):
    pipe = SNRSplitPipeline(
        [SYSTEMS["Remix-DiT"](), make_patched_unet(), SYSTEMS["DTR"]()], DDIMScheduler(), [1.0, 0.1]
    )
    assert not any(waits(accelerator, pipe))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_text_to_image_pipeline_with_experts_does_not_wait(accelerator, scheduler):
    experts = DenoiserExperts([transformer(seed=seed) for seed in (0, 1)], NoiseIntervals.from_sigmas([0.5]))
    pipe = sentence_pipe(experts)
    pipe.scheduler = experts.scheduler = scheduler()
    embeds, pooled = pipe.encode_prompt(["a bag", "a shirt"])
    text = accelerator.put({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})
    assert not any(waits(accelerator, pipe, guidance_scale=1.0, **text))


def test_guided_steps_wait_no_more_than_others(accelerator):
    """Guided by two experts; the last step tells whether all gradients were finite."""
    unet = randomised(PatchedUNet2DModel(**make_patched_unet().config | {"in_channels": 3, "num_classes": None}))
    network = LinearClassifier(randn(10, 3 * 64))
    experts = GuidanceExperts(network, **PLAIN, method="multi_experts", num_experts=2)
    pipe = ClassConditionalPipeline(unet, GuidedScheduler(DDIMScheduler(), experts, ClassTarget([1, 3])))
    accelerator.put(experts)
    assert not any(waits(accelerator, pipe, 8, batch_size=2)[2:-1])


TABLE_OF_WAITS = (REPOSITORY / "docs" / "speed.md").read_text()
WAITING = {"UniPCMultistep": 6, "FlowMapEulerDiscrete": 2, "LTXEulerAncestralRF": 1}  # Diffusers' own steps
# without the one whose noise only real devices make, and the one that goes from images to noise for most
FITTING = [
    line.split("`")[1].removesuffix("Scheduler")
    for line in TABLE.read_text().splitlines()
    if line.startswith("| `") and "right" in line and not any(name in line for name in ("DPMSolverSDE", "Inverse"))
]


@pytest.mark.parametrize("name", FITTING)
def test_only_the_schedulers_that_are_named_wait(accelerator, name):
    pipe = ClassConditionalPipeline(SYSTEMS["DiT"](), scheduler_classes()[f"{name}Scheduler"]())
    assert max(waits(accelerator, pipe)) <= WAITING.get(name, 0)
    row = next(line for line in TABLE_OF_WAITS.splitlines() if f"`{name}`" in line)
    assert f"| {WAITING.get(name, 0) or 'none'} |" in row


def test_flow_matching_does_not_wait(accelerator):
    assert not any(waits(accelerator, ClassConditionalPipeline(SYSTEMS["DTR"](), FlowMatchEulerDiscreteScheduler())))


def test_a_wait_would_be_seen(accelerator):
    """UniPC's are those of its `step`."""
    assert all(waits(accelerator, ClassConditionalPipeline(SYSTEMS["DiT"](), UniPCMultistepScheduler())))
