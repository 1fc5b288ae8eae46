"""What a CUDA GPU computes, compared with the CPU: `make test-gpu` runs these tests, and nothing else shows the suite a GPU."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_CONFIG, randomised
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from networks import PLAIN, make_resnet
from runs import train_here, weights
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    ClassTarget,
    DiTModel,
    DTRTransformer2DModel,
    GuidanceExperts,
    GuidedScheduler,
    PatchedUNet2DModel,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
)
from diffusers_dmp.models import channel_routing
from diffusers_dmp.pipelines.step_modulations import StepModulations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and `make test-gpu`, which shows it"),
]

GPU = "cuda"
# A CPU and a GPU add up in another order. Sums of a few hundred float32 products of size 1 differ by some 1e-6, which a few
# layers or sampling steps can multiply by ten; TF32, which these tests switch off, would make it 1e-3.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
UNET = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "model_channels": 32, "channel_multipliers": (1, 2),
        "layers_per_block": 1, "attention_levels": (1,), "attention_head_dim": 16, "num_classes": 10}  # fmt: skip


@pytest.fixture(autouse=True)
def without_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def make_prompted() -> nn.Module:
    model = randomised(DiTModel(**TINY_CONFIG))
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


def make_unet() -> nn.Module:
    return randomised(PatchedUNet2DModel(**UNET))


MODELS = {
    "DiT": lambda: randomised(DiTModel(**TINY_CONFIG)),
    "DTR": lambda: randomised(DTRTransformer2DModel(**TINY_CONFIG)),
    "Remix-DiT": lambda: randomised(RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7)),
    "DMP": make_prompted,
    "Patch Diffusion": make_unet,
}


@pytest.mark.parametrize("system", MODELS)
@torch.no_grad()
def test_a_forward_pass_is_the_cpus(system, batch):
    """Of samples with different timesteps."""
    model, inputs = MODELS[system](), tuple(batch.values())
    expected = model(*inputs).sample
    actual = model.to(GPU)(*[tensor.to(GPU) for tensor in inputs]).sample
    assert actual.device.type == GPU
    torch.testing.assert_close(actual.cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("system", MODELS)
@torch.no_grad()
def test_a_model_on_the_cpu_takes_timesteps_and_labels_of_the_gpu(system, batch):
    """It waits for them: while the GPU is busy, a copy that is not waited for would be read before it has arrived."""
    model, (images, *others) = MODELS[system](), batch.values()
    expected = model(images, *others).sample
    there = [tensor.to(GPU) for tensor in others]
    busy = torch.randn(4096, 4096, device=GPU)
    for _ in range(20):
        busy = busy @ busy
    torch.testing.assert_close(model(images, *[each + 0 for each in there]).sample, expected)


@pytest.mark.parametrize("timestep", [3, 700, 999])
@torch.no_grad()
def test_slices_of_channels_compute_what_masks_compute(monkeypatch, batch, timestep):
    """At DTR's window of one timestep, with inactive channels after it, on both sides, and before it; without waiting."""
    model = MODELS["DTR"]().to(GPU)
    inputs = {name: batch[name].to(GPU) for name in ("hidden_states", "class_labels")}
    masked = model(**inputs, timestep=torch.tensor(timestep, device=GPU).expand(4)).sample
    timestep = torch.tensor(timestep).expand(4)
    assert model.choose(timestep[:1])
    for smallest in (1_000_000, 0):  # of the tensors that are not masked
        monkeypatch.setattr(channel_routing, "MIN_ELEMENTS_BOUND_BY_MEMORY", smallest)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample = model(**inputs, timestep=timestep).sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(sample, masked, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_large_tensors_are_those_of_small_ones(monkeypatch, batch, dtype):
    """DTR's own backward pass, for which these are not large enough otherwise, also with a residual stream in float32."""
    model, gradients = MODELS["DTR"]().to(GPU), []
    inputs = {name: tensor.to(GPU) for name, tensor in batch.items()}
    for smallest in (1_000_000, 0):
        monkeypatch.setattr(channel_routing, "MIN_ELEMENTS_BOUND_BY_MEMORY", smallest)
        model.zero_grad()
        with torch.autocast(GPU, dtype, enabled=dtype != torch.float32):
            model(**inputs).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for small, large in zip(*gradients):
        torch.testing.assert_close(large, small, **TOLERANCE)


def make_guided_pipeline() -> ClassConditionalPipeline:
    """A patchified UNet of RGB images without labels, guided by two experts that have BatchNorm and adapters."""
    unet = randomised(PatchedUNet2DModel(**UNET | {"in_channels": 3, "num_classes": None}))
    experts = randomised(GuidanceExperts(make_resnet(), **PLAIN, method="ppap", num_experts=2, rank=2))
    scheduler = GuidedScheduler(DDIMScheduler(), experts, ClassTarget([1, 3]), scale=100.0)
    return ClassConditionalPipeline(unet, scheduler)


PIPELINES = {
    "class-conditional": lambda: ClassConditionalPipeline(MODELS["DTR"](), DDIMScheduler()),
    "prompts": lambda: ClassConditionalPipeline(make_prompted(), DDIMScheduler()),
    "split by SNR": lambda: SNRSplitPipeline([MODELS["Remix-DiT"](), make_unet()], DDIMScheduler(), [0.25]),
    "guided": make_guided_pipeline,
}


@pytest.mark.parametrize("system", PIPELINES)
def test_a_pipeline_samples_what_it_samples_on_the_cpu(system):
    """The initial noise is the CPU's; DDIM adds none."""
    pipeline = PIPELINES[system]()
    pipeline.set_progress_bar_config(disable=True)
    own = {"batch_size": 2} if system == "guided" else {"class_labels": [1, 3], "guidance_scale": 1.5}

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(**own, num_inference_steps=4, generator=generator, output_type="pt").images.cpu()

    expected = sample()
    pipeline.to(GPU)
    torch.testing.assert_close(sample(), expected, **TOLERANCE)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["DDIM", "flow"])
@torch.no_grad()
def test_no_guided_step_waits_for_the_gpu(scheduler):
    """But the first one, to which weights are moved, and the last one, which tells whether all gradients were finite."""
    noise_schedule = {"process": "flow_matching"}
    experts = GuidanceExperts(make_resnet(), **PLAIN, num_experts=2, rank=2, noise_schedule=noise_schedule)
    scheduler = GuidedScheduler(scheduler, experts, ClassTarget([1, 3]))
    scheduler.set_timesteps(6, device=GPU)
    sample, output = torch.randn(2, 3, 8, 8, device=GPU), torch.randn(2, 3, 8, 8, device=GPU)
    for index, timestep in enumerate(scheduler.timesteps):
        torch.cuda.set_sync_debug_mode("error" if 2 <= index < 5 else "default")
        try:
            sample = scheduler.step(output, timestep, sample).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all()


def test_a_deterministic_training_resumes_bit_for_bit(digits, tmp_path):
    """The resumed run repeats steps 3 and 4 of the whole one."""
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "deterministic": True}
    train_here(DTRTransformer2DModel, digits, tmp_path / "whole", **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train_here(DTRTransformer2DModel, digits, tmp_path / "resumed", resume_from_checkpoint="latest", **settings)
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "resumed").items():
        assert torch.equal(tensor, expected[name]), name


def test_the_table_of_speeds_is_measured(monkeypatch, capsys, caplog, tmp_path):
    """Forward passes, training steps and sampling, eager and compiled, of every system and Diffusers' DiT."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from benchmarks import denoisers
    from benchmarks.__main__ import main

    results = tmp_path / "speed.jsonl"
    options = ["--preset", "DiT-S/2", "--dtypes", "bfloat16", "--batch_sizes", "1", "--compile", "--seconds", "1"]
    main(["speed", *options, "--results", str(results)])
    cells = [json.loads(line)["cell"] for line in results.read_text().splitlines()]
    for how, number in (("eager", 3), ("blocks compiled", 2), ("compiled", 2), ("compiled, modulations ahead", 1)):
        systems = [cell["system"] for cell in cells if cell["how"] == how]
        expected = [system for system in denoisers.MAKERS if system != denoisers.STOCK or "ahead" not in how]
        assert sorted(systems) == sorted(expected * number), how
    assert not any("runs eagerly" in record.getMessage() for record in caplog.records)
    assert "A matrix product reached" in capsys.readouterr().out


@torch.no_grad()
def test_modulations_before_the_steps_change_no_image(monkeypatch):
    """Eagerly, and in a CUDA graph."""
    pipeline = PIPELINES["class-conditional"]().to(GPU)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        call = {"class_labels": [1, 3], "guidance_scale": 1.5, "num_inference_steps": 6, "output_type": "latent"}
        return pipeline(**call, generator=torch.Generator().manual_seed(0)).images

    with monkeypatch.context() as patch:
        patch.setattr(StepModulations, "at", lambda self, step: None)
        expected = sample()
    torch.testing.assert_close(sample(), expected, **TOLERANCE)
    pipeline.compile()
    torch.testing.assert_close(sample(), expected, **TOLERANCE)
