"""Every system in a CUDA graph: what it computes is what it computes eagerly, and no expert is captured by itself."""

import pytest
import torch
from conftest import TINY_CONFIG, randomised

from diffusers_dmp import DiTModel, DTRTransformer2DModel, PatchedUNet2DModel, PromptPatch, RemixDiTModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

GPU = "cuda"
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}  # see test_gpu.py
TIMESTEPS = [990, 800, 650, 500, 400, 200, 3]  # each of another expert of seven
UNET = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "model_channels": 32, "channel_multipliers": (1, 2),
        "layers_per_block": 1, "attention_levels": (1,), "attention_head_dim": 16, "num_classes": 10}  # fmt: skip


@pytest.fixture(autouse=True)
def without_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()


def make_prompted() -> DiTModel:
    model = randomised(DiTModel(**TINY_CONFIG))
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


MODELS = {
    "DiT": lambda: randomised(DiTModel(**TINY_CONFIG)),
    "DTR": lambda: randomised(DTRTransformer2DModel(**TINY_CONFIG)),
    "Remix-DiT": lambda: randomised(RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7)),
    "DMP": make_prompted,
    "Patch Diffusion": lambda: randomised(PatchedUNet2DModel(**UNET)),
}


@torch.no_grad()
def sample_all(model, batch) -> torch.Tensor:
    """The outputs at all timesteps, each shared by the batch; a DiT moves those on the CPU before its graph begins."""
    outputs = []
    device = "cpu" if isinstance(model, DiTModel) else GPU
    for timestep in TIMESTEPS:
        torch.compiler.cudagraph_mark_step_begin()
        inputs = batch | {"timestep": torch.tensor(timestep, device=device).expand(len(batch["class_labels"]))}
        outputs.append(model(*inputs.values()).sample.clone())  # a replay overwrites it
    return torch.stack(outputs)


@pytest.mark.parametrize("system", MODELS)
def test_a_cuda_graph_serves_all_timesteps(system, batch):
    model, batch = MODELS[system]().to(GPU), {name: tensor.to(GPU) for name, tensor in batch.items()}
    expected = sample_all(model, batch)
    model.compile(mode="reduce-overhead", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(sample_all(model, batch), expected, **TOLERANCE)


def test_other_experts_are_replayed_and_not_captured(batch):
    """A capture would allocate the activations of its graph, or record a graph for other addresses."""
    from torch._inductor.cudagraph_trees import get_container

    model, batch = MODELS["Remix-DiT"]().to(GPU), {name: tensor.to(GPU) for name, tensor in batch.items()}
    model.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        sample_all(model, batch)  # warms up, captures, and replays
    manager = get_container(torch.cuda.current_device()).get_tree_manager()
    num_graphs, memory = manager.new_graph_id().id, torch.cuda.memory_reserved()
    addresses = [tensor.data_ptr() for linear in model.basis_linears for tensor in linear._fused]
    for _ in range(3):
        sample_all(model, batch)
    assert manager.new_graph_id().id == num_graphs + 1  # this call's own
    assert torch.cuda.memory_reserved() == memory
    assert [tensor.data_ptr() for linear in model.basis_linears for tensor in linear._fused] == addresses


def test_switching_experts_does_not_wait_for_the_gpu(batch):
    model, batch = MODELS["Remix-DiT"]().to(GPU), {name: tensor.to(GPU) for name, tensor in batch.items()}
    sample_all(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_all(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compile", ["compile", "compile_repeated_blocks"])
def test_compiled_training_has_the_gradients_of_the_cpu(compile, batch):
    """Of experts in turn, in float32, and without a new graph for each."""

    def gradients(model: RemixDiTModel, device: str, expert: int) -> list[torch.Tensor]:
        model.zero_grad()
        inputs = batch | {"timestep": model.intervals.sample(expert, 4, generator=torch.Generator().manual_seed(0))}
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        drop_none = torch.zeros(4, dtype=torch.bool, device=device)
        model(**inputs, force_drop_ids=drop_none, expert=expert).sample.square().mean().backward()
        # copies: `model.to` moves gradients, too
        return [torch.clone(parameter.grad).cpu() for parameter in model.parameters() if parameter.grad is not None]

    model, experts = MODELS["Remix-DiT"]().train(), (5, 0, 6, 1)
    expected = [gradients(model, "cpu", expert) for expert in experts]
    model.to(GPU)
    getattr(model, compile)(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for expert, on_cpu in zip(experts, expected):
            torch.testing.assert_close(gradients(model, GPU, expert), on_cpu, **TOLERANCE)
