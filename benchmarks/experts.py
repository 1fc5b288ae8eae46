"""Noise experts on Diffusers' own denoisers: LoRAs, whole denoisers and routed tasks, compared with the denoiser without them."""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffusers_dmp import DenoiserExperts, LoraExperts, NoiseIntervals, TaskRouting
from diffusers_dmp.models.dit.model import DIT_PRESETS

from .ppap import num_bytes
from .pretended_accelerator import DEVICE, PretendedAccelerator
from .timing import HEADER, Ratio, Settings

SWITCH_TARGET_MS, STEP_TARGET, ROUTING_TARGET, PER_SAMPLE_TARGET, MEMORY_TARGET = 1.0, 1.01, 1.03, 1.05, 0.01
INTERVALS = NoiseIntervals.from_sigmas([0.875])
CLEAN, NOISY = 500.0, 950.0  # a timestep of each interval
NAMES = ["low", "high"]
RANK, TEXT_TOKENS, TEXT_WIDTH = 16, 77, 64
FLUX_DEPTH = {"num_layers": 19, "num_single_layers": 38}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MLP = ["net.0.proj", "net.2", "proj_mlp", "proj_out"]
MODULATION = ["norm.linear", "norm1.linear", "norm1_context.linear"]


def sd3_of(preset: str, depth: float = 1.0) -> SD3Transformer2DModel:
    """Make a denoiser of Stable Diffusion 3 with the size of a DiT preset, or a share of its depth."""
    sizes = DIT_PRESETS[preset] | {"num_layers": int(depth * DIT_PRESETS[preset]["num_layers"])}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    text = {"joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH, "caption_projection_dim": width}
    return SD3Transformer2DModel(**sizes, **text, sample_size=32, in_channels=4, out_channels=4)


def sd3_inputs(batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Make random arguments of its `forward`, without the time, for latents of 32 x 32 pixels."""
    randn = partial(torch.randn, batch_size, device=device, dtype=dtype)
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections"]
    return dict(zip(names, [randn(4, 32, 32), randn(TEXT_TOKENS, TEXT_WIDTH), randn(TEXT_WIDTH)]))


def flux_of_real_depth() -> FluxTransformer2DModel:
    """Make a denoiser with the depth of Flux and the least width."""
    sizes = {"attention_head_dim": 16, "num_attention_heads": 1, "axes_dims_rope": [4, 4, 8]}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
    return FluxTransformer2DModel(**FLUX_DEPTH, **sizes, **text, in_channels=4)


def add_loras(model: Any, targets: list[str]) -> None:
    """Add a LoRA for each interval, which is not zero."""
    for name in NAMES:
        model.add_adapter(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False), adapter_name=name)


def twin_of(model: nn.Module) -> Any:
    """Make a model of the same parameters, so that both are read from the same memory."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare switching and steps for each dtype and batch size; print memory."""
    yield from compare_calls(settings)
    for dtype in settings.dtypes:
        for batch_size in settings.batch_sizes:
            yield from compare_steps(settings, dtype, batch_size)
    print_memory_of_loras(settings)
    print_memory_of_offloading(settings)


@torch.no_grad()
def compare_calls(settings: Settings) -> Iterator[Ratio]:
    """Time calls of denoisers that do nothing else, to measure what the experts add."""
    model = flux_of_real_depth().to(settings.device).eval()
    add_loras(model, ATTENTION + MLP + MODULATION)
    num_layers = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    twin = twin_of(model)
    for each in (model, twin):
        each.forward = lambda timestep: None
    clean, noisy = (torch.tensor([t / 1000], device=settings.device) for t in (CLEAN, NOISY))
    turns, names = itertools.cycle([clean, noisy]), itertools.cycle(NAMES)

    def by_hand():
        twin.set_adapters(next(names))

    experts = LoraExperts(NAMES, INTERVALS).attach(model)
    other = settings.compare(
        "Flux's depth, a call with another LoRA: LoraExperts / set_adapters",
        lambda: model(timestep=next(turns)),
        by_hand,
    )
    yield other
    # what else is in a call, after the same other work, which leaves nothing in the processor's caches
    same = settings.compare(
        "Flux's depth, a call with the same LoRA: LoraExperts / set_adapters", partial(model, timestep=clean), by_hand
    )
    yield same
    experts.detach()
    whole = DenoiserExperts([model, twin], INTERVALS)
    yield settings.compare(
        "Flux's depth, a call: DenoiserExperts / set_adapters", partial(whole, timestep=clean), by_hand
    )

    switch_ms = other.candidate_ms - same.candidate_ms
    verdict = "✓" if switch_ms <= SWITCH_TARGET_MS else "✗"
    print(f"\nSwitching {num_layers} LoRA layers: {switch_ms:.2f} ms (≤ {SWITCH_TARGET_MS:.0f} ms {verdict}), "
          f"by set_adapters {other.baseline_ms:.1f} ms.\n\n{HEADER}")  # fmt: skip


def compare_steps(settings: Settings, dtype: torch.dtype, batch_size: int) -> Iterator[Ratio]:
    """Compare the denoiser's part of sampling steps."""
    device = settings.device
    with device:
        bare, other = (sd3_of(settings.preset).to(device).to(dtype).eval() for _ in range(2))
    inputs = sd3_inputs(batch_size, device, dtype)
    same = torch.tensor(CLEAN, device=device).expand(batch_size)  # as the pipelines pass it
    mixed = torch.linspace(0, 1000, batch_size + 2, device=device)[1:-1]
    case = f"SD3 of {settings.preset}'s size, {settings.name_of(dtype)} batch {batch_size}"

    def step_of(model: Any, timestep: torch.Tensor = same) -> Callable[[], object]:
        settings.compiled(model)

        @torch.no_grad()
        def step():
            model(**inputs, timestep=timestep, return_dict=False)

        return step

    experts = DenoiserExperts([bare, other], INTERVALS)
    yield settings.compare(f"{case}: DenoiserExperts / bare", step_of(experts), step_of(bare), STEP_TARGET)

    routed = twin_of(bare)
    TaskRouting(sharing_ratio=0.8, routing_alpha=4.0).attach(routed)
    yield settings.compare(f"{case}: TaskRouting / bare", step_of(routed), step_of(bare), ROUTING_TARGET)
    if batch_size > 1:
        steps = step_of(routed, mixed), step_of(bare, mixed)
        yield settings.compare(f"{case}, mixed timesteps: TaskRouting / bare", *steps, PER_SAMPLE_TARGET)

    adapted = twin_of(bare)
    add_loras(adapted, ATTENTION + MLP)
    plain = twin_of(adapted)
    plain.delete_adapters("high")
    LoraExperts(NAMES, INTERVALS).attach(adapted)
    yield settings.compare(f"{case}: LoraExperts / one plain LoRA", step_of(adapted), step_of(plain), STEP_TARGET)


def print_memory_of_loras(settings: Settings) -> None:
    """Print the bytes that LoRA experts take in a model and in their files."""
    model = sd3_of(settings.preset)
    bare = num_bytes(model)
    add_loras(model, ATTENTION + MLP)
    experts = LoraExperts(NAMES, INTERVALS).attach(model)
    with tempfile.TemporaryDirectory() as folder:
        experts.save_pretrained(folder)
        in_files = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    ratio = (num_bytes(model) - bare) / in_files
    verdict = "✓" if abs(ratio - 1) <= MEMORY_TARGET else "✗"
    print(f"\nMemory of {len(NAMES)} LoRA experts of rank {RANK}: {ratio:.4f} of their files' {in_files / 2**20:.2f} MiB "
          f"(1 ± {MEMORY_TARGET} {verdict})")  # fmt: skip


def print_memory_of_offloading(settings: Settings) -> None:
    """Print the peak memory of two offloaded experts that denoise in turn, and of the larger one alone."""
    larger, smaller = sd3_of(settings.preset), sd3_of(settings.preset, depth=0.5)
    both = DenoiserExperts([smaller, twin_of(larger)], INTERVALS)
    timesteps = [NOISY, CLEAN, NOISY]
    peaks = [peak_of_offloaded(model, timesteps, settings.device) for model in (both, larger)]
    ratio = peaks[0] / peaks[1]
    verdict = "✓" if ratio <= STEP_TARGET else "✗"
    where = "on the GPU" if settings.device.type == "cuda" else "on a pretended accelerator"
    print(f"Peak memory {where} of two offloaded experts: {ratio:.4f} of the larger one's {peaks[1] / 2**20:.1f} MiB "
          f"(≤ {STEP_TARGET:.2f} {verdict})")  # fmt: skip


@torch.no_grad()
def peak_of_offloaded(model: nn.Module, timesteps: list[float], device: torch.device) -> int:
    """Return the most bytes that are on an accelerator while an offloaded denoiser is called at some timesteps."""
    is_gpu = device.type == "cuda"
    accelerator = PretendedAccelerator()
    inputs = sd3_inputs(1, torch.device("cpu"), torch.float32) | {"timesteps": torch.tensor(timesteps)}
    inputs = {name: tensor.to(device) if is_gpu else accelerator.put(tensor) for name, tensor in inputs.items()}
    device = device if is_gpu else DEVICE
    _, hook = cpu_offload_with_hook(model, device)  # what `enable_model_cpu_offload` does for each part of a pipeline
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with nullcontext() if is_gpu else accelerator:
        for timestep in inputs.pop("timesteps").split(1):
            model(**inputs, timestep=timestep, return_dict=False)
        hook.offload()
    hook.remove()
    return torch.cuda.max_memory_allocated() - before if is_gpu else accelerator.peak_bytes
