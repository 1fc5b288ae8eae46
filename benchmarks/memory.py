"""`python -m benchmarks.memory [preset …]`: the memory that a preset's training step takes on a CUDA GPU, estimated without one.

A step is run on PyTorch's `meta` device; see step_memory.py.

The one preset that was measured on a GPU is printed first, with its measurement. Presets of text-to-image pipelines, whose
denoisers are frozen, are in text_memory.py.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DPTConfig,
    DPTForDepthEstimation,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from diffusers_dmp import (
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
)
from diffusers_dmp.training.arguments import (
    SharedTrainingArguments,
    TrainingArguments,
    model_arguments,
    parse_arguments,
)
from diffusers_dmp.training.objectives.distillation import StudentOutput, prediction
from diffusers_dmp.training.objectives.from_arguments import make_objective
from diffusers_dmp.training.objectives.objective import NoisedBatch

from .step_memory import step_memory
from .text_memory import ARCHITECTURES, describe, text_step_memory

GIGABYTE = 1e9
VAE_WIDTH, VAE_TENSORS = 128, 4  # of Stable Diffusion's encoder at the images' full size, in float32
ENTRY_POINTS = Path(__file__).parent.parent / "training"
PRESETS = ENTRY_POINTS / "presets"
MEASURED = ("patch_imagenet256", 66)  # GB, on an H100


def step_bytes(
    model: nn.Module, objective: nn.Module, args: TrainingArguments, shape: tuple[int, ...], **inputs
) -> int:
    """
    The memory of a training step.

    Args:
        model (`nn.Module`), objective (`nn.Module`): On the `meta` device.
        args ([`SharedTrainingArguments`]): For the micro-batch, checkpointing and averaging.
        shape (`tuple[int, ...]`): Of one sample.
        inputs: Further arguments of the model.
    """
    batch = args.batch_size // args.gradient_accumulation_steps
    x0, noise, x_t = (torch.randn(batch, *shape, device="meta") for _ in range(3))
    timesteps = torch.zeros(batch, dtype=torch.long, device="meta")
    return step_memory(
        model,
        args,
        lambda: model(x_t, timesteps, **inputs).sample,
        lambda prediction: objective(prediction, NoisedBatch(x0, noise, timesteps)),
    ).total


def vae_bytes(args: SharedTrainingArguments) -> int:
    """The memory of encoding a micro-batch of images, before the step; nothing for latents that were encoded once."""
    if args.vae is None or "latents" in args.dataset:
        return 0
    pixels = args.batch_size // args.gradient_accumulation_steps * args.image_size**2
    return VAE_TENSORS * VAE_WIDTH * pixels * 4


def estimate(preset: str, **changes: Any) -> float:
    """The memory that a preset takes, in GB."""
    system, _, data = preset.partition("_")
    if system in ARCHITECTURES:
        return text_step_memory(preset, **changes).total / GIGABYTE
    classes = 1000 if data.startswith("imagenet") else 1
    with torch.device("meta"):
        model, args, inputs = MAKERS[system](str(PRESETS / f"{preset}.yaml"), classes)
    args = replace(args, **changes)
    shape = (
        (3, args.image_size, args.image_size) if args.vae is None else (4, args.image_size // 8, args.image_size // 8)
    )
    batch = args.batch_size // args.gradient_accumulation_steps
    if classes > 1 and system != "ppap":
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long, device="meta")
        inputs["force_drop_ids"] = torch.zeros(batch, dtype=torch.bool, device="meta")
    objective = (
        Squares() if system == "ppap" else make_objective(args, model, in_latents=args.vae is not None).to("meta")
    )
    return max(step_bytes(model.train(), objective, args, shape, **inputs), vae_bytes(args)) / GIGABYTE


def make_patch(config: str, classes: int) -> tuple[nn.Module, TrainingArguments, dict[str, Any]]:
    """A UNet of pixels."""
    from train_patch_diffusion import PatchDiffusionTrainingArguments

    args = parse_arguments(PatchDiffusionTrainingArguments, ["--config", config])
    own: dict[str, Any] = {"sample_size": args.image_size, "out_channels": 6, "num_classes": classes}
    if classes == 1:
        own |= {"num_classes": None, "class_dropout_prob": 0.0}
    return PatchedUNet2DModel(**model_arguments(PatchedUNet2DModel, args) | own), args, {}


def make_dtr(config: str, classes: int) -> tuple[nn.Module, TrainingArguments, dict[str, Any]]:
    """A DTR of latents."""
    from train_dtr import DTRTrainingArguments

    args = parse_arguments(DTRTrainingArguments, ["--config", config])
    return DTRTransformer2DModel.from_preset(args.preset, num_classes=classes), args, {}


def make_remix(config: str, classes: int) -> tuple[nn.Module, TrainingArguments, dict[str, Any]]:
    """A Remix-DiT of the size of the DiT that the preset starts from."""
    from train_remix import RemixTrainingArguments

    args = parse_arguments(RemixTrainingArguments, ["--config", config])
    model = RemixDiTModel.from_preset(
        "RemixDiT-XL/2", num_classes=classes, num_bases=args.num_bases, num_experts=args.num_experts
    )
    return model, args, {"expert": 0}


def make_dmp(config: str, classes: int) -> tuple[nn.Module, TrainingArguments, dict[str, Any]]:
    """A frozen DiT of the size that the preset names, and its prompts."""
    from train_dmp import DMPTrainingArguments

    args = parse_arguments(DMPTrainingArguments, ["--config", config])
    size = "DiT-XL/2" if classes > 1 else "DiT-L/2"
    base = DiTModel.from_preset(size, num_classes=classes, class_dropout_prob=0.1 if classes > 1 else 0.0)
    PromptPatch.for_transformer(base, mode=args.prompt_mode, topk=args.topk).attach(base)
    return base, args, {}


class Student(nn.Module):
    """The first of a network's experts, called as a denoiser is."""

    def __init__(self, network: PreTrainedModel, image_size: int | None):
        super().__init__()
        with patch("diffusers_dmp.guidance.experts.network_sha256", return_value=""):  # there are no weights to hash
            self.experts = GuidanceExperts(network, [0.5] * 3, [0.5] * 3, image_size)
        self.experts.requires_grad_of_expert(0)

    def forward(self, images: torch.Tensor, timesteps: torch.Tensor) -> StudentOutput:
        return StudentOutput(sample=prediction(self.experts.run_expert(0, images, merged=False)))


class Squares(nn.Module):
    """A loss of as few tensors as the experts' distillation."""

    def forward(self, output: torch.Tensor, batch: NoisedBatch) -> torch.Tensor:
        return (output**2).mean()


def make_ppap(config: str, classes: int) -> tuple[nn.Module, SharedTrainingArguments, dict[str, Any]]:
    """One expert of a published network, of whose configuration transformers has the sizes."""
    from train_ppap import PPAPTrainingArguments

    args = parse_arguments(PPAPTrainingArguments, ["--config", config])
    network, image_size = NETWORKS[args.base_model]
    return Student(network(), args.network_image_size or image_size), args, {}


# transformers' defaults are ResNet-50 and the hybrid DPT; the second entry is what their image processors scale to
NETWORKS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "microsoft/resnet-50": (lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)), 224),
    "facebook/deit-small-patch16-224": (
        lambda: DeiTForImageClassification(
            DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
        ),
        224,
    ),
    "Intel/dpt-hybrid-midas": (
        lambda: DPTForDepthEstimation(
            DPTConfig(is_hybrid=True, neck_hidden_sizes=[256, 512, 768, 768], backbone_out_indices=[2, 5, 8, 11])
        ),
        384,
    ),
}
MAKERS = {"patch": make_patch, "dtr": make_dtr, "remix": make_remix, "dmp": make_dmp, "ppap": make_ppap}


def published_presets() -> list[str]:
    """The presets of published models whose memory can be estimated."""
    names = [path.stem for path in sorted(PRESETS.glob("*.yaml"))]
    names = [name for name in names if name.partition("_")[0] in {*MAKERS, *ARCHITECTURES}]
    return [name for name in names if not any(data in name for data in ("digits", "rgb", "fashion"))]


def main() -> None:
    sys.path.insert(0, str(ENTRY_POINTS))
    name, measured = MEASURED
    print(f"{name}: estimated {estimate(name):.0f} GB, measured {measured} GB")
    for preset in sys.argv[1:] or published_presets():
        is_text = preset.partition("_")[0] in ARCHITECTURES
        print(describe(preset) if is_text else f"{preset}: estimated {estimate(preset):.0f} GB", flush=True)


if __name__ == "__main__":
    main()
