"""DMP: what a frozen base saves in training, and what a patch costs in sampling."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from diffusers_dmp import DiTModel, PromptPatch

from .timing import Ratio, compare

TRAINING_TARGETS = {1: 0.75, 8: 0.70}  # by batch size
ACTIVATIONS_TARGET = 0.55
PARAMETERS_TARGET = 0.015


def patched(preset: str, device: torch.device, dtype: torch.dtype) -> tuple[DiTModel, PromptPatch]:
    """A DiT and its patch, neither at its initialisation, which would let arithmetic off lightly."""
    torch.manual_seed(0)
    model = DiTModel.from_preset(preset)
    patch = PromptPatch.for_transformer(model)
    for module in (model, patch):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        module.to(device).to(dtype)
    patch.attach(model.eval())
    return model, patch


def saved_bytes(step: Callable[[], object], parameters: list[nn.Parameter]) -> int:
    """What a step keeps for its backward pass, the parameters themselves apart, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in storages.values())


def run(
    preset: str, device: torch.device, dtypes: list[torch.dtype], batch_sizes: list[int], compile: bool, budget: float
) -> Iterator[Ratio]:
    """
    Args:
        preset (`str`): 'DiT-S/2' and so on, on 32 x 32 latents of 4 channels; a prompt for each token and block.
        dtypes (`list[torch.dtype]`), batch_sizes (`list[int]`): Each with each.
        compile (`bool`): Compile the blocks first.
        budget (`float`): Seconds per comparison.
    """
    memory = []
    for dtype in dtypes:
        frozen, patch = patched(preset, device, dtype)
        trainable, other_patch = patched(preset, device, dtype)
        trainable.requires_grad_(True)
        plain = DiTModel.from_preset(preset).to(device).to(dtype).eval()
        plain.load_state_dict(frozen.state_dict())
        if compile:
            for model in (frozen, trainable, plain):
                model.compile_repeated_blocks()
        name = str(dtype).removeprefix("torch.") + (" compiled" if compile else "")

        for batch_size in batch_sizes:
            case = f"{preset} {name} batch {batch_size}"
            sample = torch.randn(batch_size, 4, 32, 32, device=device, dtype=dtype)
            timesteps = torch.randint(0, 1000, (batch_size,), device=device)
            labels = torch.randint(0, 1000, (batch_size,), device=device)

            def training_step(model, patch, sample=sample, timesteps=timesteps, labels=labels):
                for module in (model, patch):
                    module.zero_grad(set_to_none=True)
                output = model(sample, timesteps, class_labels=labels)
                (output.sample.square().mean() + output.importance_loss).backward()

            patch.train(), other_patch.train()
            steps = partial(training_step, frozen, patch), partial(training_step, trainable, other_patch)
            target = TRAINING_TARGETS.get(batch_size)
            yield compare(f"{case}, training step: frozen base / trainable base", *steps, device, budget, target)
            if not compile:
                activations = [
                    saved_bytes(step, [*model.parameters(), *prompts.parameters()])
                    for step, model, prompts in zip(steps, (frozen, trainable), (patch, other_patch))
                ]
                share = activations[0] / activations[1]
                memory.append(
                    f"{case}: saved for the backward pass {activations[0] / 2**20:.1f} of {activations[1] / 2**20:.1f} MiB, "
                    f"{share:.3f} times (≤ {ACTIVATIONS_TARGET} {'✓' if share <= ACTIVATIONS_TARGET else '✗'})"
                )
            gradients = [p.grad for module in (frozen, patch) for p in module.parameters() if p.grad is not None]
            gradient_bytes = sum(gradient.nbytes for gradient in gradients)
            patch_bytes = sum(parameter.nbytes for parameter in patch.parameters())
            memory.append(
                f"{case}: gradients {gradient_bytes / 2**20:.2f} MiB, the patch's parameters {patch_bytes / 2**20:.2f} MiB "
                f"({'✓' if gradient_bytes == patch_bytes else '✗'})"
            )

            patch.eval()
            host_labels = labels.cpu()  # as the pipeline passes them
            other_timesteps = itertools.count()  # there is another one at every call, as in a first sampling run

            @torch.no_grad()
            def forward(model, new_timestep, sample=sample, labels=host_labels, other_timesteps=other_timesteps):
                timestep = next(other_timesteps) / 1000 if new_timestep else 700
                return model(sample, torch.tensor(timestep).expand(len(sample)), class_labels=labels)

            for what, new_timestep in (("gates computed", True), ("gates kept", False)):
                forwards = partial(forward, frozen, new_timestep), partial(forward, plain, new_timestep)
                yield compare(f"{case}, sampling, {what}: patched / plain", *forwards, device, budget, 1.03)

    print("\n".join(["", *memory]))
    with torch.device("meta"):
        base = DiTModel.from_preset("DiT-L/2")
        share = PromptPatch.for_transformer(base).num_parameters() / base.num_parameters()
    verdict = "✓" if share <= PARAMETERS_TARGET else "✗"
    print(f"Parameters of a patch on DiT-L/2: {share:.2%} of the base's (≤ {PARAMETERS_TARGET:.1%} {verdict})")
