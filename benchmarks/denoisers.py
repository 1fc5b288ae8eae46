"""The denoisers that are compared with one another: our DiT, the systems that extend it, and Diffusers' own DiT."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from diffusers_dmp import ClassConditionalPipeline, DiTModel, DTRTransformer2DModel, PromptPatch, RemixDiTModel
from diffusers_dmp.models.dit.configuration import DIT_PRESETS
from diffusers_dmp.pipelines.denoiser_inputs import reads_inputs_on_cpu
from diffusers_dmp.plugins.attachment import patch_of

DIT, DTR, REMIX, DMP, STOCK = "DiT", "DTR", "Remix-DiT", "DMP", "Diffusers' DiT"
IMAGE = {"sample_size": 32, "in_channels": 4, "out_channels": 8}  # latents of 256 pixels, and a learned variance
NUM_CLASSES = 1000
TIMESTEP, EXPERT = 700, 5  # a timestep, and the one of Remix-DiT's 8 experts that owns it


def prompted(**sizes: Any) -> DiTModel:
    """Make a frozen DiT with a prompt for each token and block."""
    model = DiTModel(**sizes)
    PromptPatch.for_transformer(model).attach(model)
    return model


MAKERS: dict[str, Callable[..., nn.Module]] = {
    DIT: DiTModel,
    DTR: DTRTransformer2DModel,
    REMIX: RemixDiTModel,  # 4 bases, 8 experts
    DMP: prompted,
    STOCK: DiTTransformer2DModel,
}


def sizes_of(preset: str) -> dict[str, int]:
    """The arguments of any of the denoisers, for a preset's size."""
    return DIT_PRESETS[preset] | IMAGE


def make_denoiser(
    system: str, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """
    Make a denoiser on its device, in eval mode. No weight keeps its initialisation: a GPU multiplies zeros faster.

    Args:
        system (`str`): A key of `MAKERS`.
        sizes (`Mapping[str, int]`): See [`sizes_of`].
        device (`torch.device`): The device, on which the weights are made.
        dtype (`torch.dtype`): The weights' dtype.
    """
    with device:
        model = MAKERS[system](**sizes)
    parts = parts_of(model)
    with torch.no_grad():
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            parameter.normal_(std=0.02)
    for part in parts:
        cast(part, device, dtype).eval()
    return model


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Move and cast a model. Diffusers' own `to` warns at every dtype, also of models without layers that stay in float32."""
    return nn.Module.to(model, device, dtype)


def parts_of(model: nn.Module) -> list[nn.Module]:
    """A denoiser, and the prompts that are attached to it, if any."""
    patch = patch_of(model)
    return [model] if patch is None else [model, patch]


def learned(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained: with prompts attached, theirs alone."""
    return [parameter for part in parts_of(model) for parameter in part.parameters() if parameter.requires_grad]


def in_training(model: Any) -> Any:
    """Return a denoiser in training mode, and the prompts that are attached to it."""
    for part in parts_of(model):
        part.train()
    return model


def sampling_inputs(model: Any, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make the inputs of a sampling step as the pipelines pass them: on the CPU what the denoiser, or its prompts, read there."""
    cpu = torch.device("cpu")
    return {
        "hidden_states": torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype),
        "timestep": torch.tensor(TIMESTEP, device=cpu if reads_inputs_on_cpu(model) else device).expand(batch_size),
        "class_labels": torch.randint(NUM_CLASSES, (batch_size,), device=device if patch_of(model) is None else cpu),
    }


def training_inputs(model: Any, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Make the inputs of a training step: a timestep for each sample; for Remix-DiT all of one expert, as its training has them."""
    inputs = {
        "hidden_states": torch.randn(batch_size, 4, 32, 32, device=device),
        "timestep": torch.randint(1000, (batch_size,), device=device),
        "class_labels": torch.randint(NUM_CLASSES, (batch_size,), device=device),
    }
    if isinstance(model, RemixDiTModel):
        inputs |= {"timestep": model.intervals.sample(EXPERT, batch_size).to(device), "expert": EXPERT}
    return inputs


def compute_gradients(model: Any, inputs: dict[str, Any], autocast: torch.dtype | None = None) -> None:
    """
    Compute the gradients of a training step; those of an earlier one are dropped.

    Args:
        model ([`ModelMixin`]): The denoiser, in training mode.
        inputs (`dict[str, Any]`): See [`training_inputs`].
        autocast (`torch.dtype`, *optional*): The dtype of matrix products; by default the weights' own.
    """
    for parameter in learned(model):
        parameter.grad = None
    with nullcontext() if autocast is None else torch.autocast(model.device.type, autocast):
        output = model(**inputs)
    losses = [output.get(name) for name in ("prior_loss", "importance_loss") if output.get(name) is not None]
    sum(losses, output.sample.float().square().mean()).backward()


def make_pipeline(system: str, model: Any) -> Any:
    """
    Make the pipeline of a denoiser. Diffusers' own one always decodes, here with the smallest VAE that there can be.

    Args:
        system (`str`): A key of `MAKERS`.
        model ([`ModelMixin`]): The denoiser.
    """
    if system != STOCK:
        pipeline: Any = ClassConditionalPipeline(model, DDIMScheduler())
    else:
        vae = AutoencoderKL(block_out_channels=(1,), latent_channels=IMAGE["in_channels"], norm_num_groups=1)
        pipeline = DiTPipeline(model, cast(vae, model.device, model.dtype), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, num_inference_steps: int) -> None:
    """Sample one image with guidance; it stays on the device."""
    output_type = "pt" if isinstance(pipeline, DiTPipeline) else "latent"
    pipeline([207], guidance_scale=4.0, num_inference_steps=num_inference_steps, output_type=output_type)
