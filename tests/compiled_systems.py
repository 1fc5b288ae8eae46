"""A tiny pipeline of every system, to be compiled, and how many graphs it takes."""

import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from networks import PLAIN, make_resnet
from peft import LoraConfig
from tiny_pipelines import seeded

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    GuidedScheduler,
    LoraExperts,
    NoiseIntervals,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
    TaskRouting,
)

TINY = TINY_CONFIG | {"num_layers": 1}
INTERVALS = NoiseIntervals.uniform(3)
PATCHED_UNET = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "model_channels": 32, "channel_multipliers": (1,),
                "layers_per_block": 1, "attention_levels": (0,), "attention_head_dim": 16, "num_classes": 10}  # fmt: skip
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8,), "layers_per_block": 1,
        "norm_num_groups": 4, "num_class_embeds": 10, "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        "add_attention": False}  # fmt: skip
STOCK_DIT = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1,
             "sample_size": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4}  # fmt: skip


def dit(**config):
    return randomised(DiTModel(**TINY | config))


def patched_unet(**config):
    return randomised(PatchedUNet2DModel(**PATCHED_UNET | config))


def prompted(model):
    return randomised(PromptPatch.for_transformer(model), seed=1).attach(model)


def with_loras(model):
    for index in range(3):
        model.add_adapter(LoraConfig(r=2, target_modules=["to_qkv"]), f"lora_{index}")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=seeded(len(name)))
    return LoraExperts(["lora_0", "lora_1", None], INTERVALS).attach(model)


def routed(model):
    return TaskRouting().attach(model)


def pipeline_of(model, scheduler=None) -> ClassConditionalPipeline:
    return ClassConditionalPipeline(model, scheduler or DDIMScheduler())


def with_plugin(attach, make=dit) -> ClassConditionalPipeline:
    model = make()
    attach(model)
    return pipeline_of(model)


def guided() -> ClassConditionalPipeline:
    experts = randomised(GuidanceExperts(make_resnet(), **PLAIN, method="ppap", num_experts=2, rank=2))
    scheduler = GuidedScheduler(DDIMScheduler(), experts, ClassTarget([1, 3]), scale=100.0)
    return pipeline_of(patched_unet(in_channels=3, num_classes=None), scheduler)


def split(*denoisers) -> SNRSplitPipeline:
    boundaries = [4.0, 0.05][: len(denoisers) - 1]
    return SNRSplitPipeline(list(denoisers), DDIMScheduler(), boundaries)


# the pipeline, and the number of graphs of all of its denoisers
SYSTEMS = {
    "DiT": (lambda: pipeline_of(dit()), 1),
    "DTR": (lambda: pipeline_of(randomised(DTRTransformer2DModel(**TINY))), 1),
    "Remix-DiT": (lambda: pipeline_of(randomised(RemixDiTModel(**TINY, num_bases=3, num_experts=4))), 1),
    "prompts": (lambda: with_plugin(prompted), 1),
    "LoRA for each interval": (lambda: with_plugin(with_loras), 3),  # whose layers differ
    "Patch Diffusion": (lambda: pipeline_of(patched_unet()), 1),
    "Diffusers' DiT": (lambda: pipeline_of(randomised(DiTTransformer2DModel(**STOCK_DIT))), 1),
    "Diffusers' UNet": (lambda: pipeline_of(randomised(UNet2DModel(**UNET))), 1),
    "routing": (lambda: with_plugin(routed), 1),
    "routing of Diffusers' UNet": (lambda: with_plugin(routed, lambda: randomised(UNet2DModel(**UNET))), 2),
    "split by SNR": (lambda: split(dit(), dit(), dit(num_layers=2)), 2),
    "experts": (lambda: pipeline_of(DenoiserExperts([dit(), dit(), dit()], INTERVALS)), 1),
    "guided": (guided, 1),
}


def sample(pipe, batch_size=2, **call) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    if pipe.num_classes is None:
        call["batch_size"] = batch_size
    else:
        call = {"class_labels": list(range(batch_size)), "guidance_scale": 1.5 if pipe.has_null_class else 1.0} | call
    steps = {"num_inference_steps": 5, "generator": seeded()}
    return pipe(**steps | call, output_type="latent").images
