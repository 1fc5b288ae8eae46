"""What a preset of `train_text_to_image.py` trains, and the memory that a step takes, on the `meta` device: no weights are needed.

The configurations in `architectures/` are those of the published checkpoints that `_name_or_path` names.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from diffusers_dmp.training.denoiser import TextDenoiser
from diffusers_dmp.training.parsing import parse_arguments
from diffusers_dmp.training.text_pipelines import text_pipeline_of
from diffusers_dmp.training.text_to_image import TextToImageArguments
from diffusers_dmp.training.text_to_image.lora import LoraDenoiser, add_loras

from .step_memory import StepMemory, step_memory

FOLDER = Path(__file__).parent / "architectures"
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """
    A published denoiser, and the samples that its preset is meant for.

    Args:
        name (`str`): Its file in `architectures/`.
        pipeline (`str`): The class of its pipeline.
        latents (`tuple[int, ...]`): The shape of the latents of one sample.
        columns (`dict[str, tuple[int, ...]]`): The shapes of what one prompt, and one size, is encoded into.
    """

    name: str
    pipeline: str
    latents: tuple[int, ...]
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The configuration of the denoiser."""
        return json.loads((FOLDER / f"{self.name}.json").read_text())

    def make(self) -> Any:
        """The denoiser with its weights in bfloat16, frozen, on the `meta` device."""
        config = self.config()
        with torch.device("meta"):
            model = getattr(diffusers, config["_class_name"]).from_config(config)
        return model.to(torch.bfloat16).requires_grad_(False)


SD3 = {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)}
ARCHITECTURES = {
    "sd3": Architecture(name="sd3_medium", pipeline="StableDiffusion3Pipeline", latents=(16, 128, 128), columns=SD3),
    "sd35": Architecture(name="sd35_large", pipeline="StableDiffusion3Pipeline", latents=(16, 128, 128), columns=SD3),
    "flux": Architecture(
        name="flux_dev",
        pipeline="FluxPipeline",
        latents=(16, 128, 128),
        columns={"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    ),
    "wan22": Architecture(
        name="wan22_t2v_a14b",
        pipeline="WanPipeline",
        latents=(16, 1, 60, 104),
        columns={"prompt_embeds": (512, 4096)},
    ),
    "sdxl": Architecture(
        name="sdxl_base",
        pipeline="StableDiffusionXLPipeline",
        latents=(4, 128, 128),
        columns={"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)},
    ),
}


def adapted(architecture: Architecture, args: TextToImageArguments) -> LoraDenoiser:
    """Put the LoRA of a preset into a denoiser, as the training does; its parameters are those that are trained."""
    model = architecture.make()
    names = [f"expert_{index}" for index in range(args.count_experts())]
    trained = names if args.single_expert is None else [names[args.single_expert]]
    with torch.device("meta"):
        add_loras(model, args, names, names, trained)
    return LoraDenoiser(model, trained)


def text_arguments(preset: str) -> TextToImageArguments:
    """The arguments of a preset."""
    return parse_arguments(TextToImageArguments, ["--config", preset])


def text_step_memory(preset: str, architecture: str | None = None, **changes: Any) -> StepMemory:
    """
    Estimate the memory of a preset's training step.

    Args:
        preset (`str`): Its name.
        architecture (`str`, *optional*): A key of `ARCHITECTURES`; by default the preset's own.
        changes: Arguments instead of the preset's.
    """
    args = replace(text_arguments(preset), **changes)
    found = ARCHITECTURES[architecture or preset.partition("_")[0]]
    return adapted_step_memory(found, adapted(found, args), args)


def describe(preset: str) -> str:
    """Say how many parameters a preset trains, and what memory a step takes."""
    args = text_arguments(preset)
    architecture = ARCHITECTURES[preset.partition("_")[0]]
    model = adapted(architecture, args)
    memory = adapted_step_memory(architecture, model, args)
    parts = [f"{bytes / 1e9:.2f} {name}" for name, bytes in asdict(memory).items()]
    trained = sum(parameter.numel() for parameter in model.parameters())
    return f"{preset}: {trained:,} parameters trained, estimated {memory.total / 1e9:.0f} GB ({', '.join(parts)})"


def adapted_step_memory(architecture: Architecture, model: LoraDenoiser, args: TextToImageArguments) -> StepMemory:
    """Estimate the memory of a step with a micro-batch, as if all of it were of one expert."""
    family = text_pipeline_of(getattr(diffusers, architecture.pipeline))
    denoiser = TextDenoiser(family.call, model.denoiser, NUM_TRAIN_TIMESTEPS)
    batch = args.batch_size // args.gradient_accumulation_steps
    with torch.device("meta"):
        x_t, timesteps = torch.randn(batch, *architecture.latents), torch.zeros(batch)
        conditions = {name: torch.randn(batch, *shape) for name, shape in architecture.columns.items()}
        return step_memory(
            model.denoiser,
            args,
            lambda: denoiser(model, x_t, timesteps, conditions).sample,
            lambda prediction: F.mse_loss(prediction, torch.zeros_like(prediction)),
        )
