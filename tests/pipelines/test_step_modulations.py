"""Modulations that are computed before the steps: they change no image, and are left out where they could."""

import pytest
import torch
from accelerate import cpu_offload
from conftest import TINY_CONFIG, randomised
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from peft import LoraConfig
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dmp import (
    ClassConditionalPipeline,
    DenoiserExperts,
    DiTModel,
    DTRTransformer2DModel,
    LoraExperts,
    NoiseIntervals,
    PromptPatch,
    RemixDiTModel,
    SNRSplitPipeline,
    TaskRouting,
)
from diffusers_dmp.pipelines.denoiser_inputs import DenoiserInputs
from diffusers_dmp.pipelines.step_modulations import StepModulations, has_fixed_modulations, timesteps_at_once

WIDTH = 48  # of TINY_CONFIG
CPU = torch.device("cpu")


def make_dit(seed: int = 0, **config) -> DiTModel:
    return randomised(DiTModel(**TINY_CONFIG | config), seed)


def make_prompted() -> DiTModel:
    model = make_dit()
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


def make_routed() -> DiTModel:
    model = make_dit()
    TaskRouting(sharing_ratio=0.5).attach(model)
    return model


SYSTEMS = {
    "DiT": make_dit,
    "DTR": lambda: randomised(DTRTransformer2DModel(**TINY_CONFIG)),
    "Remix-DiT": lambda: randomised(RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7)),
    "DMP": make_prompted,
    "task routing": make_routed,
}
SCHEDULERS = {
    "learned variance": lambda: DDPMScheduler(variance_type="learned_range", clip_sample=False),
    "DDIM": DDIMScheduler,
    "timesteps that are no integers": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "two evaluations in a step": HeunDiscreteScheduler,
    "four evaluations in a step": PNDMScheduler,
    "flow matching": FlowMatchEulerDiscreteScheduler,
}


def pipeline_of(model: nn.Module, scheduler=None) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(model, scheduler or DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, labels=(1, 2), **arguments) -> torch.Tensor:
    defaults = {"guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "latent"}
    return pipeline(list(labels), generator=torch.Generator().manual_seed(0), **defaults | arguments).images


@pytest.fixture
def calls(monkeypatch) -> list[list[float]]:
    """The timesteps of each call of `modulations_at`."""
    found, modulations_at = [], DiTModel.modulations_at

    def record(self, timesteps, class_labels):
        found.append(timesteps.tolist())
        return modulations_at(self, timesteps, class_labels)

    monkeypatch.setattr(DiTModel, "modulations_at", record)
    return found


@pytest.fixture
def step_by_step(monkeypatch):
    """Generate as `generate` does, but without modulations before the steps."""

    def run(*args, **kwargs) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(StepModulations, "at", lambda self, step: None)
            return generate(*args, **kwargs)

    return run


# The images are the same


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_images_are_those_without(system, scheduler, calls, step_by_step):
    pipeline = pipeline_of(SYSTEMS[system](), SCHEDULERS[scheduler]())
    expected = step_by_step(pipeline)
    assert calls == []
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 1
    assert len(set(calls[0])) == len(calls[0])  # also where a timestep is visited twice


def test_others_would_make_other_images(step_by_step, monkeypatch):
    pipeline = pipeline_of(make_dit())
    at, expected = StepModulations.at, step_by_step(pipeline)
    for wrong in (
        lambda self, step: at(self, (step + 1) % 5),  # of another step
        lambda self, step: at(self, step).flip(2),  # of other samples
    ):
        with monkeypatch.context() as patch:
            patch.setattr(StepModulations, "at", wrong)
            assert (generate(pipeline) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, [1.5, 3.0]])
@pytest.mark.parametrize("num_images_per_label", [1, 2])
def test_images_of_any_call_are_those_without(guidance_scale, num_images_per_label, calls, step_by_step):
    if isinstance(guidance_scale, list):
        guidance_scale = guidance_scale * num_images_per_label
    call = {"guidance_scale": guidance_scale, "num_images_per_label": num_images_per_label}
    pipeline = pipeline_of(make_dit())
    torch.testing.assert_close(generate(pipeline, **call), step_by_step(pipeline, **call), atol=1e-4, rtol=1e-4)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, calls, step_by_step):
    """What the timesteps are embedded from is in float32 in both."""
    pipeline = pipeline_of(make_dit().to(dtype))
    expected = step_by_step(pipeline).float()
    assert (generate(pipeline).float() - expected).norm() < 0.02 * expected.norm()
    assert len(calls) == 1


def test_each_denoiser_computes_those_of_its_own_steps(calls, step_by_step):
    pipeline = SNRSplitPipeline([make_dit(seed) for seed in (0, 1)], DDIMScheduler(), [0.25])
    pipeline.set_progress_bar_config(disable=True)
    expected = step_by_step(pipeline)
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-4, rtol=1e-4)
    timesteps, (low, high) = pipeline.scheduler.timesteps.tolist(), pipeline.steps_per_denoiser(5)
    assert calls == [timesteps[:high], timesteps[high:]] and low > 0 < high


def test_an_unconditional_model_shares_them_among_the_batch(step_by_step, monkeypatch):
    pipeline = pipeline_of(make_dit(num_classes=1, class_dropout_prob=0.0))
    at, seen = StepModulations.at, []
    monkeypatch.setattr(StepModulations, "at", lambda self, step: seen.append(at(self, step)) or seen[-1])
    call = {"labels": [0] * (WIDTH + 1), "guidance_scale": 1.0, "num_inference_steps": 2}
    torch.testing.assert_close(generate(pipeline, **call), step_by_step(pipeline, **call), atol=1e-4, rtol=1e-4)
    assert [each.shape for each in seen] == [(2, 6, 1, 1, WIDTH)] * 2


# How many at once


def test_they_take_no_more_memory_than_the_weights_that_make_them():
    model = make_dit()
    weights = sum(block.norm1.linear.weight.nbytes for block in model.transformer_blocks)
    for batch_size in (1, 4, 5, WIDTH):
        count, labels = timesteps_at_once(model, batch_size), torch.zeros(batch_size, dtype=torch.long)
        assert model.modulations_at(torch.arange(count), labels).nbytes <= weights
        assert model.modulations_at(torch.arange(count + 1), labels).nbytes > weights
    assert timesteps_at_once(DenoiserExperts([model, make_dit()], NoiseIntervals.uniform(2, 1000)), 1) == 0


@pytest.mark.parametrize(("num_steps", "sizes"), [(12, [12]), (13, [12, 1]), (25, [12, 12, 1])])
def test_more_steps_are_computed_in_parts(num_steps, sizes, calls, step_by_step):
    """With guidance the batch is 4."""
    pipeline = pipeline_of(make_dit())
    expected = step_by_step(pipeline, num_inference_steps=num_steps)
    torch.testing.assert_close(generate(pipeline, num_inference_steps=num_steps), expected, atol=1e-3, rtol=1e-3)
    assert [len(timesteps) for timesteps in calls] == sizes
    assert sum(calls, []) == pipeline.scheduler.timesteps.tolist()


def test_a_batch_of_which_not_two_steps_fit_has_none(calls):
    pipeline = pipeline_of(make_dit())
    generate(pipeline, labels=[1] * (WIDTH // 2 + 1), guidance_scale=1.0)
    assert calls == []
    generate(pipeline, labels=[1] * (WIDTH // 2), guidance_scale=1.0, num_inference_steps=2)
    assert len(calls) == 1


# Where they are left out


def shift_time(model, args):
    sample, timestep = args
    return sample, (timestep + 7).clamp(max=999)


def twice(module, args, output):
    return 2 * output


def add_foreign_forward(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda sample, timestep, class_labels: forward(sample, timestep, 10 - class_labels)


ALTERED = {
    "hook that changes the time": lambda model: model.register_forward_pre_hook(shift_time),
    "hook on the embedder": lambda model: model.time_label_embed.register_forward_hook(twice),
    "hook in the embedder": lambda model: model.time_label_embed.class_embedder.register_forward_hook(twice),
    "hook that changes a block's conditioning": lambda model: model.transformer_blocks[1].register_forward_pre_hook(
        lambda block, args: (args[0], 2 * args[1])
    ),
    "hook in a block": lambda model: model.transformer_blocks[1].norm1.linear.register_forward_hook(twice),
    "forward of its own": add_foreign_forward,
    "adapters of a block": lambda model: model.add_adapter(LoraConfig(target_modules=["norm1.linear"], lora_alpha=64, init_lora_weights=False)),
    "adapters of the embedder": lambda model: model.add_adapter(
        LoraConfig(target_modules=["timestep_embedder.linear_1"], lora_alpha=64, init_lora_weights=False)
    ),
    "weights elsewhere": lambda model: cpu_offload(model, CPU),
    "weights in 8 bits": lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_model_has_none(how, calls, step_by_step):
    model = make_dit()
    pipeline = pipeline_of(model)
    assert has_fixed_modulations_without_gradients(model)
    plain = generate(pipeline)
    assert len(calls) == 1
    ALTERED[how](model)
    model.eval()  # new adapters are in training mode
    images = generate(pipeline)
    assert len(calls) == 1
    assert torch.equal(images, step_by_step(pipeline))  # the same computation
    assert how == "weights elsewhere" or (images - plain).abs().max() > 1e-3


@torch.no_grad()
def has_fixed_modulations_without_gradients(model: nn.Module) -> bool:
    return has_fixed_modulations(model, CPU)


@pytest.mark.group_offload
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_groups_that_are_offloaded(offload_type):
    pipeline = pipeline_of(make_dit())
    images = generate(pipeline)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipeline.transformer.enable_group_offload(CPU, offload_type=offload_type, **blocks)
    assert not has_fixed_modulations_without_gradients(pipeline.transformer)
    torch.testing.assert_close(generate(pipeline), images, atol=1e-4, rtol=1e-4)


def test_training_mode_and_gradients():
    """Training drops labels at random, and weights that were used before get no gradients."""
    model = make_dit()
    assert not has_fixed_modulations(model, CPU)
    assert has_fixed_modulations_without_gradients(model)
    model.time_label_embed.train()
    assert not has_fixed_modulations_without_gradients(model)
    assert not has_fixed_modulations_without_gradients(model.eval().to("meta"))


def add_loras(model: DiTModel, target: str) -> None:
    for name in ("low", "high"):
        model.add_adapter(LoraConfig(target_modules=[target], lora_alpha=64), name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    model.eval()


def test_adapters_that_a_callback_switches(step_by_step):
    """Each step has the adapter that is active then."""
    pipeline = pipeline_of(make_dit())
    add_loras(pipeline.transformer, "norm1.linear")

    def switch(pipe, step, timestep, tensors):
        pipe.transformer.set_adapter("low" if step % 2 else "high")
        return {}

    def images(run, **arguments) -> torch.Tensor:
        pipeline.transformer.set_adapter("low")
        return run(pipeline, **arguments)

    switched = images(generate, callback_on_step_end=switch)
    assert torch.equal(switched, images(step_by_step, callback_on_step_end=switch))
    assert (switched - images(generate)).abs().max() > 1e-3


@pytest.mark.parametrize(("target", "num_calls"), [("norm1.linear", 0), ("attn.to_out", 1)])
def test_adapters_of_intervals(target, num_calls, calls, step_by_step):
    """Those of other layers leave the modulations as they are."""
    pipeline = pipeline_of(make_dit())
    add_loras(pipeline.transformer, target)
    pipeline.transformer.set_adapter("low")
    low = generate(pipeline)
    calls.clear()
    LoraExperts(["low", "high"], NoiseIntervals((0, 500, 1000))).attach(pipeline.transformer)
    images = generate(pipeline)
    assert len(calls) == num_calls
    torch.testing.assert_close(images, step_by_step(pipeline), atol=1e-4, rtol=1e-4)
    assert (images - low).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["weights", "adapters"])
def test_what_a_callback_changes_counts_from_the_next_step_on(change, step_by_step):
    def run(generate) -> torch.Tensor:
        pipeline = pipeline_of(make_dit())

        def callback(pipe, step, timestep, tensors):
            model = pipe.transformer
            if step == 2 and change == "weights":
                model.transformer_blocks[1].norm1.linear.weight.mul_(-1)
            elif step == 2:
                add_loras(model, "norm1.linear")
            return {}

        return generate(pipeline, callback_on_step_end=callback)

    images = run(generate)
    torch.testing.assert_close(images, run(step_by_step), atol=1e-4, rtol=1e-4)
    assert (images - generate(pipeline_of(make_dit()))).abs().max() > 1e-3


# Together with others


def test_prompts_have_the_gates_that_they_had(calls, step_by_step):
    """And find them in their cache: it has one entry for each step."""

    def gates(run) -> tuple[dict, int]:
        pipeline = pipeline_of(make_prompted())
        patch = pipeline.prompt_patch
        for _ in range(2):
            run(pipeline)
        computed = []
        patch.register_forward_hook(lambda *args: computed.append(args))
        run(pipeline)
        return {key: value[0].gates for key, value in patch._attachment.gate_cache._gates.items()}, len(computed)

    (known, computed), (expected, expected_computed) = gates(generate), gates(step_by_step)
    assert len(calls) == 3
    assert known.keys() == expected.keys() and len(known) == 5
    for key, value in expected.items():
        torch.testing.assert_close(known[key], value)
    assert computed == expected_computed == 0


def test_one_graph_serves_all_steps_and_calls(calls, step_by_step):
    torch.compiler.reset()
    pipeline = pipeline_of(SYSTEMS["Remix-DiT"]())
    expected = step_by_step(pipeline)
    counter = CompileCounter()
    pipeline.transformer.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(generate(pipeline), expected, atol=1e-4, rtol=1e-4)
        generate(pipeline, labels=(3, 3), num_inference_steps=13)
    assert counter.frame_count == 1 and len(calls) == 3


def test_a_compiled_pipeline(calls, step_by_step):
    torch.compiler.reset()
    pipeline = pipeline_of(make_dit())
    expected = step_by_step(pipeline)
    pipeline.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_model_that_was_compiled_as_a_whole(calls, step_by_step):
    torch.compiler.reset()
    pipeline = pipeline_of(make_dit())
    expected = step_by_step(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(generate(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 1


# What else a step launches


class Operations(TorchDispatchMode):
    """Lists the operations that compute something."""

    OTHERS = ("alias", "detach", "expand", "promote_types", "select", "slice", "split")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names += [] if name in self.OTHERS else [name]
        return func(*args, **kwargs or {})


class Constant(nn.Module):
    """A denoiser that computes nothing."""

    config = {"num_classes": 10}  # noqa: RUF012
    dtype = torch.float32

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, sample, timestep, class_labels):
        return UNet2DOutput(sample=sample.new_empty((len(sample), self.channels, 8, 8)))


@pytest.mark.parametrize(
    ("guidance", "keeps_variance", "expected"),
    [
        (None, False, []),
        (None, True, []),
        (2.0, False, ["cat", "lerp"]),
        (torch.full((1, 1, 1, 1), 2.0), False, ["cat", "lerp"]),
        (2.0, True, ["cat", "lerp", "cat"]),  # and the variance beside it
    ],
)
def test_a_step_launches_little_around_the_denoiser(guidance, keeps_variance, expected):
    labels, sample = torch.tensor([3]), torch.zeros(1, 4, 8, 8)
    inputs = DenoiserInputs(Constant(8), torch.tensor([500]), CPU, [0], guidance, labels)
    with Operations() as operations:
        inputs.predict(0, sample, None, keeps_variance)
    operations.names.remove("new_empty")
    assert operations.names == expected
