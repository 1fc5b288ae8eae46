"""DMP: the time and memory that a frozen base saves in training, and the cost of prompts in sampling."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from diffusers_dmp import DiTModel, PromptPatch

from .timing import Ratio, Settings

TRAINING_TARGETS = {1: 0.75, 8: 0.70}  # by batch size
ACTIVATIONS_TARGET = 0.55
PARAMETERS_TARGET = 0.015
NEW_TIMESTEPS = (
    50_000  # of which a benchmark does not come to the end, nor does the cache of gates keep the first that long
)


def patched(preset: str, device: torch.device, dtype: torch.dtype) -> tuple[DiTModel, PromptPatch]:
    """Make a DiT with prompts. Neither keeps its initialisation, whose zeros would make arithmetic faster."""
    torch.manual_seed(0)
    with device:
        model = DiTModel.from_preset(preset)
        patch = PromptPatch.for_transformer(model)
    for module in (model, patch):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        module.to(device).to(dtype)
    patch.attach(model.eval())
    return model, patch


def saved_bytes(step: Callable[[], object], parameters: list[nn.Parameter]) -> int:
    """Count the bytes that a step saves for its backward pass, without the parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # kept alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


@dataclass
class Batch:
    """Random latents (B, 4, 32, 32), timesteps (B,) and labels (B,)."""

    sample: torch.Tensor
    timesteps: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def make(cls, size: int, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Make a batch of `size` samples."""
        sample = torch.randn(size, 4, 32, 32, device=device, dtype=dtype)
        timesteps, labels = (torch.randint(0, 1000, (size,), device=device) for _ in range(2))
        return cls(sample, timesteps, labels)


def training_step(model: DiTModel, patch: PromptPatch, batch: Batch) -> None:
    """Compute the gradients of a batch."""
    for module in (model, patch):
        module.zero_grad(set_to_none=True)
    output = model(batch.sample, batch.timesteps, class_labels=batch.labels)
    (output.sample.square().mean() + output.importance_loss).backward()


def memory_lines(case: str, models: list[tuple[DiTModel, PromptPatch]], batch: Batch, compiled: bool) -> list[str]:
    """Describe the memory of a training step with the frozen base, the first model, and with the trainable one."""
    lines = []
    frozen, patch = models[0]
    if not compiled:
        activations = [
            saved_bytes(partial(training_step, *each, batch), [*each[0].parameters(), *each[1].parameters()])
            for each in models
        ]
        share = activations[0] / activations[1]
        lines.append(
            f"{case}: saved for the backward pass {activations[0] / 2**20:.1f} of {activations[1] / 2**20:.1f} MiB, "
            f"{share:.3f} times (≤ {ACTIVATIONS_TARGET} {'✓' if share <= ACTIVATIONS_TARGET else '✗'})"
        )
    gradients = [p.grad for module in (frozen, patch) for p in module.parameters() if p.grad is not None]
    gradient_bytes = sum(gradient.nbytes for gradient in gradients)
    patch_bytes = sum(parameter.nbytes for parameter in patch.parameters())
    lines.append(
        f"{case}: gradients {gradient_bytes / 2**20:.2f} MiB, the patch's parameters {patch_bytes / 2**20:.2f} MiB "
        f"({'✓' if gradient_bytes == patch_bytes else '✗'})"
    )
    return lines


def compare_sampling(
    settings: Settings, case: str, frozen: DiTModel, plain: DiTModel, batch: Batch
) -> Iterator[Ratio]:
    """Compare forward passes with and without prompts, at new timesteps and at one timestep, whose gates are cached."""
    size, devices = (
        len(batch.labels),
        {frozen: torch.device("cpu"), plain: settings.device},
    )  # as the pipelines pass inputs
    labels = {model: batch.labels.to(where) for model, where in devices.items()}
    known = {model: torch.tensor(700, device=where) for model, where in devices.items()}
    new = {
        model: itertools.cycle(torch.arange(NEW_TIMESTEPS, device=where) / 1000) for model, where in devices.items()
    }

    @torch.no_grad()
    def forward(model, is_new):
        timestep = next(new[model]) if is_new else known[model]
        return model(batch.sample, timestep.expand(size), class_labels=labels[model])

    for what, is_new in (("gates computed", True), ("gates cached", False)):
        forwards = partial(forward, frozen, is_new), partial(forward, plain, is_new)
        yield settings.compare(f"{case}, sampling, {what}: with prompts / plain", *forwards, 1.03)


def run(settings: Settings) -> Iterator[Ratio]:
    """Compare training steps and forward passes, with a prompt for each token and block; print memory at the end."""
    preset, device = settings.preset, settings.device
    memory = []
    for dtype in settings.dtypes:
        frozen, patch = patched(preset, device, dtype)
        trainable, other_patch = patched(preset, device, dtype)
        trainable.requires_grad_(True)
        with device:
            plain = DiTModel.from_preset(preset)
        plain = plain.to(device).to(dtype).eval()
        plain.load_state_dict(frozen.state_dict())
        if settings.compile:
            for model in (frozen, trainable, plain):
                model.compile_repeated_blocks(dynamic=False)
        models = [(frozen, patch), (trainable, other_patch)]

        for batch_size in settings.batch_sizes:
            case = f"{preset} {settings.name_of(dtype)} batch {batch_size}"
            batch = Batch.make(batch_size, device, dtype)
            patch.train(), other_patch.train()
            steps = [partial(training_step, *each, batch) for each in models]
            what = f"{case}, training step: frozen base / trainable base"
            yield settings.compare(what, *steps, TRAINING_TARGETS.get(batch_size))
            memory += memory_lines(case, models, batch, settings.compile)
            patch.eval()
            yield from compare_sampling(settings, case, frozen, plain, batch)

    print("\n".join(["", *memory]))
    with torch.device("meta"):
        base = DiTModel.from_preset("DiT-L/2")
        share = PromptPatch.for_transformer(base).num_parameters() / base.num_parameters()
    verdict = "✓" if share <= PARAMETERS_TARGET else "✗"
    print(f"Parameters of a patch on DiT-L/2: {share:.2%} of the base's (≤ {PARAMETERS_TARGET:.1%} {verdict})")
