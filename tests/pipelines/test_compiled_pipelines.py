"""Pipelines that are compiled by one call: for every system the images of the eager pipeline, one graph for all of its experts."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from compiled_systems import STOCK_DIT, SYSTEMS, dit, pipeline_of, prompted, routed, sample, split, with_loras
from conftest import randomised
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch._dynamo.testing import CompileCounter

from diffusers_dmp import ClassConditionalPipeline
from diffusers_dmp.models.compilation import Compilation
from diffusers_dmp.models.compiled_calls import compilation_of


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


# those that another test compiles as well, or that are as another one
SLOW = ("prompts", "routing", "routing of Diffusers' UNet", "LoRA for each interval", "Diffusers' DiT", "Diffusers' UNet", "experts",
        "Patch Diffusion")  # fmt: skip


@pytest.mark.parametrize("system", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in SYSTEMS])
def test_a_compiled_system_samples_what_it_samples_eagerly(system):
    """In whole graphs, and nothing is compiled again when the expert changes in a later sampling."""
    make, num_graphs = SYSTEMS[system]
    pipe = make()
    expected = sample(pipe)
    compiled = CompileCounter()
    pipe.compile(backend=compiled, fullgraph=True)
    torch.testing.assert_close(sample(pipe), expected)
    assert compiled.frame_count == num_graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(sample(pipe), expected)


def test_a_replay_copies_no_weights_into_its_graph():
    """Also not those that a Remix-DiT fuses: what a CUDA graph gets anew in each step is small."""
    pipe, copied = SYSTEMS["Remix-DiT"][0](), []

    def look(graph, inputs):
        for node in graph.graph.nodes:
            # private to Dynamo, which tells a backend in this way what stays where it is
            if node.op == "placeholder" and "_dynamo_static_input_type" not in node.meta.get("tensor_dict", {}):
                copied.append(node.name)
        return graph.forward

    pipe.compile(backend=look, fullgraph=True)
    sample(pipe)
    names = {"hidden_states", "timestep", "class_labels", "modulations"}
    assert {name.removeprefix("l_").removesuffix("_") for name in copied} <= names and len(copied) >= 3


PLUGINS = {"prompts": prompted, "LoRA for each interval": with_loras, "routing": routed}


@pytest.mark.parametrize(
    "plugin", [pytest.param(each, marks=[pytest.mark.slow] * (each != "prompts")) for each in PLUGINS]
)
@pytest.mark.parametrize(
    "make",
    [dit, pytest.param(lambda: randomised(DiTTransformer2DModel(**STOCK_DIT)), marks=pytest.mark.slow)],
    ids=["DiT", "Diffusers' DiT"],
)
def test_plugins_come_and_go_after_compiling(plugin, make):
    attach, model = PLUGINS[plugin], make()
    if not hasattr(model, "add_adapter") and plugin.startswith("LoRA"):
        pytest.skip("takes no adapters")
    pipe = pipeline_of(model)
    compiled = CompileCounter()
    pipe.compile(backend=compiled, fullgraph=True)
    before = sample(pipe)
    attached = attach(model)
    for _ in range(2):
        with_it = sample(pipe)
        with torch.compiler.set_stance("force_eager"):  # PyTorch's way back
            torch.testing.assert_close(with_it, sample(pipe))
    assert not torch.allclose(with_it, before, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        sample(pipe)
    attached.detach()
    with torch.compiler.set_stance("force_eager"):
        expected = sample(pipe)
    torch.testing.assert_close(sample(pipe), expected)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_schedulers_that_keep_earlier_outputs(scheduler, monkeypatch):
    """With a backend that returns the same memory again and again, as CUDA graphs do. PNDM keeps the outputs as they are."""
    pipe = pipeline_of(dit(), scheduler())
    expected = sample(pipe, guidance_scale=1.0)
    monkeypatch.setattr(Compilation, "captures_graphs", lambda self, device: True)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    pipe.compile(backend=in_the_same_memory, fullgraph=True)
    torch.testing.assert_close(sample(pipe, guidance_scale=1.0), expected)


def in_the_same_memory(graph, inputs):
    outputs = []

    def replay(*args):
        computed = graph(*args)
        outputs.extend(each.clone() for each in computed[len(outputs) :])
        return tuple(output.copy_(each) for output, each in zip(outputs, computed))

    return replay


@pytest.mark.slow
def test_sizes_alternate():
    pipe = pipeline_of(dit())
    calls = [{}, {"height": 12}, {"batch_size": 3}, {}, {"batch_size": 3, "height": 12}]
    expected = [sample(pipe, **call, num_inference_steps=1) for call in calls]
    compiled = CompileCounter()
    pipe.compile(backend=compiled, fullgraph=True)
    for call, images in zip(calls, expected):
        torch.testing.assert_close(sample(pipe, **call, num_inference_steps=1), images)
    assert compiled.frame_count <= 4


def test_the_rest_of_a_pipelines_life(tmp_path):
    pipe = pipeline_of(dit())
    expected = sample(pipe)
    first, second = CompileCounter(), CompileCounter()
    pipe.compile(backend=first)
    pipe.compile(backend=second)  # replaces the first
    torch.testing.assert_close(sample(pipe), expected)
    assert (first.frame_count, second.frame_count) == (0, 1)
    shared = ClassConditionalPipeline.from_pipe(pipe)
    torch.testing.assert_close(sample(shared), expected)
    assert second.frame_count == 1  # what is shared is compiled
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(pipe)):
        assert compilation_of(other.transformer) is None
        torch.testing.assert_close(sample(other), expected)
    half, eager = pipe.to(torch.bfloat16), copy.deepcopy(pipe)
    torch.testing.assert_close(sample(half), sample(eager))


OFFLOADING = {
    "models": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
    "groups": lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
}


@pytest.mark.parametrize("how", OFFLOADING)
@pytest.mark.parametrize("make", [lambda: pipeline_of(dit()), lambda: split(dit(), dit())], ids=["one", "several"])
def test_graphs_and_offloading_are_not_for_one_pipeline(make, how, monkeypatch):
    pipe = make()
    monkeypatch.setattr(Compilation, "captures_graphs", lambda self, device: True)
    pipe.compile(backend="eager")
    with pytest.raises(ValueError, match=r"DiTModel without CUDA graphs, as .*offloading.*compile\(mode=.default"):
        OFFLOADING[how](pipe)


@pytest.mark.parametrize(
    "how", ["models", "sequential", pytest.param("groups", marks=[pytest.mark.slow, pytest.mark.group_offload])]
)
@pytest.mark.parametrize("order", ["offloaded first", "compiled first"])
def test_an_offloaded_pipeline_is_compiled_without_graphs(how, order, warned, monkeypatch):
    """Where layers are moved one by one, not even that, which is said."""
    # as Diffusers does for an accelerator; with the CPU's name it breaks
    offload = lambda self, device: cpu_offload(self.transformer, torch.device(device))  # noqa: E731
    monkeypatch.setattr(DiffusionPipeline, "enable_sequential_cpu_offload", offload)
    pipe = pipeline_of(dit())
    expected = sample(pipe)
    if order == "compiled first":
        pipe.compile(backend="eager")
    OFFLOADING[how](pipe)
    if order == "offloaded first":
        with pytest.raises(ValueError, match="another than the mode 'reduce-overhead', as .*offloading"):
            pipe.compile(mode="reduce-overhead")
        pipe.compile(backend="eager")
        with torch.no_grad():
            assert not compilation_of(pipe.transformer).captures_graphs(torch.device("cuda"))
    torch.testing.assert_close(sample(pipe), expected)
    one_by_one = ["The DiTModel runs eagerly, as it cannot be compiled: its layers are offloaded one by one."]
    assert warned == (one_by_one if how == "sequential" else [])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["DiT", "Remix-DiT", "split by SNR", "guided"])
def test_what_inductor_compiles(system):
    pipe = SYSTEMS[system][0]()
    expected = sample(pipe)
    pipe.compile()
    torch.testing.assert_close(sample(pipe), expected, atol=1e-4, rtol=1e-3)
    assert not compilation_of(pipe.denoisers[0]).is_eager
