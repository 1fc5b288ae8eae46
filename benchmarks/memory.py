"""`python -m benchmarks.memory [preset …]`: the memory that a preset's training step takes on a CUDA GPU, estimated without one.

A step is run on PyTorch's `meta` device, which has shapes and no numbers, and what autograd keeps for the backward pass is
added up:

    parameters, their gradients, AdamW's moments and averaged weights, as far as they are there
  + tensors kept for the backward pass, bfloat16 where CUDA's autocast computes in it
  + three times the largest of them, for what the backward pass computes with.

The one preset that was measured on a GPU is printed first, with its measurement.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
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

GIGABYTE = 1e9
WORKING_TENSORS = 3
VAE_WIDTH, VAE_TENSORS = 128, 4  # of Stable Diffusion's encoder at the images' full size, in float32
ENTRY_POINTS = Path(__file__).parent.parent / "training"
PRESETS = ENTRY_POINTS / "presets"
MEASURED = ("patch_imagenet256", 66)  # GB, on an H100

# What CUDA's autocast computes in bfloat16 and in float32, as far as the models here have it:
# https://pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
IN_BFLOAT16 = {
    F.conv2d,
    F.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.baddbmm,
}
IN_FLOAT32 = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.exp, torch.pow}


class MetaAutocast(TorchFunctionMode):
    """CUDA's autocast and its memory-saving attention, for the `meta` device, which has neither."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args)) | kwargs
            inputs = [cast(named[name], torch.bfloat16) for name in ("query", "key", "value")]
            return torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[0]
        if function in IN_BFLOAT16 | IN_FLOAT32:
            dtype = torch.bfloat16 if function in IN_BFLOAT16 else torch.float32
            args = tuple(cast(value, dtype) for value in args)
            kwargs = {name: cast(value, dtype) for name, value in kwargs.items()}
        return function(*args, **kwargs)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another dtype; anything else as it is."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class KeptTensors:
    """The storages that are kept for the backward pass, each counted once."""

    def __init__(self, without: Iterator[torch.Tensor]):
        self.ignored = {tensor.untyped_storage()._cdata for tensor in without}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.ignored:
            self.storages[storage._cdata] = storage  # held, so that its identity is not another's later
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    @property
    def largest(self) -> int:
        return max((storage.nbytes() for storage in self.storages.values()), default=0)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context whose operations keep tensors."""
        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            yield


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
    kept, inner = KeptTensors(model.parameters()), [KeptTensors(model.parameters())]

    def checkpointed(layer: Callable, *layer_inputs: Any) -> Any:
        for value in layer_inputs:
            if isinstance(value, torch.Tensor):
                kept.add(value)
        inner.append(KeptTensors(model.parameters()))
        with inner[-1].recorded():
            return layer(*layer_inputs)

    for module in model.modules():
        if args.gradient_checkpointing and hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing, module._gradient_checkpointing_func = True, checkpointed
    with kept.recorded():
        with MetaAutocast():
            prediction = model(x_t, timesteps, **inputs).sample.float()
        objective(prediction, NoisedBatch(x0, noise, timesteps))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    copies = 3 + (args.ema_decay > 0)  # gradients, two moments, averaged weights
    weights = sum(parameter.nbytes for parameter in model.parameters())
    weights += copies * sum(parameter.nbytes for parameter in learned)
    working = WORKING_TENSORS * max(kept.largest, *(each.largest for each in inner))
    return weights + kept.total + max(each.total for each in inner) + working


def vae_bytes(args: SharedTrainingArguments) -> int:
    """The memory of encoding a micro-batch of images, before the step; nothing for latents that were encoded once."""
    if args.vae is None or "latents" in args.dataset:
        return 0
    pixels = args.batch_size // args.gradient_accumulation_steps * args.image_size**2
    return VAE_TENSORS * VAE_WIDTH * pixels * 4


def estimate(preset: str, **changes: Any) -> float:
    """The memory that a preset takes, in GB."""
    system, _, data = preset.partition("_")
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
    return [name for name in names if name.partition("_")[0] in MAKERS and "digits" not in name]


def main() -> None:
    sys.path.insert(0, str(ENTRY_POINTS))
    name, measured = MEASURED
    print(f"{name}: estimated {estimate(name):.0f} GB, measured {measured} GB")
    for preset in sys.argv[1:] or published_presets():
        print(f"{preset}: estimated {estimate(preset):.0f} GB", flush=True)


if __name__ == "__main__":
    main()
