"""How denoisers are compiled: options, what falls back to eager, CUDA graphs as far as they can be seen without a GPU, and experts."""

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import TINY_CONFIG, randomised
from diffusers import FirstBlockCacheConfig
from tiny_pipelines import RECIPES, flux, generate, sd3
from torch._dynamo.testing import CompileCounter

from diffusers_dmp import DenoiserExperts, DiTModel, NoiseIntervals
from diffusers_dmp.models import compiled_calls
from diffusers_dmp.models.compilation import Compilation
from diffusers_dmp.models.compiled_calls import compilation_of, compile_denoisers
from diffusers_dmp.models.compiled_modules import at_least_graphs

CPU = torch.device("cpu")
GPU = torch.device("cuda")  # its name alone
TINY = TINY_CONFIG | {"num_layers": 1}
INTERVALS = NoiseIntervals.from_timesteps([500])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.fixture
def as_if_captured(monkeypatch):
    """Let a CPU seem to capture CUDA graphs: all that is done around them is done, but there are none. Counts the steps begun."""
    steps = []
    monkeypatch.setattr(Compilation, "captures_graphs", lambda self, device: True)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append("step"))
    return steps


def dit(**config) -> DiTModel:
    return randomised(DiTModel(**TINY | config))


@torch.no_grad()
def call(model, batch_size=2, height=8, width=8, timestep=300):
    images = torch.randn(batch_size, 4, height, width, generator=torch.Generator().manual_seed(batch_size * height))
    labels = torch.arange(batch_size) % 10
    return model(images, torch.tensor(timestep).expand(batch_size), class_labels=labels).sample


def failing(graph, inputs):
    raise RuntimeError("No working compiler found.\nInstall one.")


# --- options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "inducter"}, r"`backend` to be one of .*inductor.*, or a function, but got 'inducter'"),
        ({"mode": "fast"}, r"`mode` to be one of default, .*reduce-overhead.*, or None, but got 'fast'"),
        ({"backend": "eager", "mode": "default"}, "no `mode` for a backend other than 'inductor'.*'eager'"),
        (
            {"mode": "reduce-overhead"},
            r"a CUDA device for the mode 'reduce-overhead'.*'cpu'.*to\(.cuda.\).* default, .*no-cuda",
        ),
        ({"mode": "max-autotune"}, "a CUDA device for the mode 'max-autotune'"),
        ({"backend": "cudagraphs"}, "a CUDA device for the backend 'cudagraphs'"),
        ({"options": {"triton.cudagraphs": True}}, "a CUDA device for the options.*triton.cudagraphs"),
    ],
    ids=str,
)
def test_what_the_device_has_not_is_refused_before_anything_is_compiled(options, message):
    model = dit()
    with pytest.raises(ValueError, match=message) as error:
        compile_denoisers([model], CPU, **options)
    assert "\n" not in str(error.value)
    assert not model.is_compiled


def test_options_that_pytorch_does_not_know_are_refused_at_once():
    with pytest.raises(TypeError, match="fullgrph"):
        compile_denoisers([dit()], CPU, fullgrph=True)
    with pytest.raises(RuntimeError, match="[Ee]ither mode or options"):
        compile_denoisers([dit()], CPU, mode="max-autotune-no-cudagraphs", options={"max_autotune": True})


@torch.no_grad()
def test_cuda_graphs_are_for_cuda_devices_whose_weights_stay_where_they_are():
    assert Compilation().mode_on(GPU) == "reduce-overhead" and Compilation().captures_graphs(GPU)
    assert Compilation().mode_on(CPU) == "default" and not Compilation().captures_graphs(CPU)
    offloaded = Compilation(obstacle=compiled_calls.OFFLOADING)
    assert offloaded.mode_on(GPU) == "default" and not offloaded.captures_graphs(GPU)
    for mode, captures in [("default", False), ("max-autotune", True), ("max-autotune-no-cudagraphs", False)]:
        assert Compilation(mode=mode).mode_on(GPU) == mode
        assert Compilation(mode=mode).captures_graphs(GPU) is captures
    assert Compilation(backend="cudagraphs").captures_graphs(GPU)
    assert not Compilation(backend="eager").captures_graphs(GPU)
    with torch.enable_grad():  # in training
        assert Compilation().mode_on(GPU) == "default"


# --- falling back --------------------------------------------------------------------------------------------------------


def test_without_a_compiler_all_is_computed_eagerly_and_said_once(warned):
    models = [dit(), dit(num_layers=2)]
    expected = [call(model) for model in models]
    compile_denoisers(models, CPU, backend=failing)
    for _ in range(2):
        for model, sample in zip(models, expected):
            assert torch.equal(call(model), sample)
    assert warned == ["The DiTModel runs eagerly, as it cannot be compiled: RuntimeError: No working compiler found."]


def test_a_user_who_asks_for_one_graph_gets_the_error():
    model = dit()
    compile_denoisers([model], CPU, backend=failing, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="No working compiler"):
        call(model)


@pytest.mark.parametrize("make", [dit, sd3], ids=["DiT", "SD3"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_errors_of_a_call_are_those_of_the_model(make, fullgraph, warned):
    model = make()
    image, hidden = torch.randn(1, 3, 8, 8), {} if make is dit else {"encoder_hidden_states": torch.randn(1, 7, 5)}

    def error():
        with torch.no_grad(), pytest.raises(Exception) as found:
            model(image, timestep=torch.tensor([3]), **hidden)
        return type(found.value), str(found.value)

    expected = error()
    compile_denoisers([model], CPU, backend="eager", fullgraph=fullgraph)
    assert error() == expected
    assert not warned and not compilation_of(model).is_eager


@pytest.mark.slow
def test_inductor_without_a_cpp_compiler(warned):
    # PyTorch may remember which compiler it found before
    forget_compiler = getattr(torch._inductor.cpp_builder.get_cpp_compiler, "cache_clear", lambda: None)
    model = dit()
    expected = call(model)
    forget_compiler()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), torch._inductor.utils.fresh_cache():
        compile_denoisers([model], CPU)
        assert torch.equal(call(model), expected)
    forget_compiler()
    assert len(warned) == 1 and "ompiler" in warned[0]


# --- sizes ---------------------------------------------------------------------------------------------------------------


def test_sizes_that_alternate_are_compiled_once_for_all_batches():
    model = dit()
    sizes = [(2, 8, 8), (3, 8, 8), (5, 8, 8), (2, 8, 8), (4, 8, 8)]
    expected = [call(model, *size) for size in sizes]
    compiled = CompileCounter()
    compile_denoisers([model], CPU, backend=compiled, fullgraph=True)
    for size, sample in zip(sizes, expected):
        torch.testing.assert_close(call(model, *size), sample)
    assert compiled.frame_count == 2  # of the first size, and of any


@pytest.mark.slow
def test_resolutions_that_alternate_are_compiled_a_few_times_in_all():
    """The table of positions makes the first of them graphs of their own: higher, wider, square and any."""
    model = dit()
    sizes = [(2, 8, 8), (3, 8, 8), (2, 12, 8), (2, 8, 12), (3, 12, 12), (2, 16, 12)]
    sizes += [(5, 16, 16), (4, 20, 12), (2, 24, 24)]
    expected = [call(model, *size) for size in sizes]
    compiled = CompileCounter()
    compile_denoisers([model], CPU, backend=compiled, fullgraph=True)
    for size, sample in zip(sizes, expected):
        torch.testing.assert_close(call(model, *size), sample)
    assert compiled.frame_count <= 6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, sample in [*zip(sizes, expected)][::-1]:
            torch.testing.assert_close(call(model, *size), sample)


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_more_models_of_a_class_than_pytorch_makes_graphs_of(count, monkeypatch):
    """Its limit of 8 is for a class: the ninth size of model would run eagerly, without an error."""
    limit = min(count - 1, torch._dynamo.config.recompile_limit)
    models = [dit(attention_head_dim=4 * size, num_attention_heads=1) for size in range(1, count + 1)]
    expected = [call(model) for model in models]
    compiled = CompileCounter()
    compile_denoisers(models, CPU, backend=compiled)
    with torch._dynamo.config.patch(recompile_limit=limit):
        for model, sample in zip(models, expected):
            torch.testing.assert_close(call(model), sample)
        assert torch._dynamo.config.recompile_limit == limit  # of others
    assert compiled.frame_count == count


def test_the_limit_of_graphs_has_another_name_before_torch_2_7(monkeypatch):
    seen = []
    config = SimpleNamespace(cache_size_limit=8, patch=lambda changes: nullcontext(seen.append(changes)))
    monkeypatch.setattr(torch._dynamo, "config", config)
    for number in (2, 256):
        with at_least_graphs(number):
            pass
    assert seen == [{"cache_size_limit": 8}, {"cache_size_limit": 256}]


def test_models_of_one_size_share_a_graph():
    models = [dit() for _ in range(10)]
    for seed, model in enumerate(models):
        randomised(model, seed)
    expected = [call(model) for model in models]
    compiled = CompileCounter()
    compile_denoisers(models, CPU, backend=compiled, fullgraph=True)
    for model, sample in zip(models, expected):
        torch.testing.assert_close(call(model), sample)
    assert compiled.frame_count == 1


# --- CUDA graphs, of which a CPU has none --------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_are_copied_as_the_next_replay_overwrites_them(as_if_captured):
    kept = torch.zeros(2, 4, 8, 8)

    def replayed(sample):
        return kept.add_(1), "no tensor"

    model = dit()
    calls = compiled_calls.CompiledCalls(replayed, model, Compilation(backend="eager"))
    (first, _), (second, other) = calls(kept), calls(kept)
    assert (first == 1).all() and (second == 2).all() and other == "no tensor"
    assert len(as_if_captured) == 2


@pytest.mark.parametrize(("make", "return_dict"), [(dit, True), (sd3, False)], ids=["DiT", "SD3"])
def test_every_output_of_a_denoiser_is_copied(make, return_dict, as_if_captured):
    text = {"encoder_hidden_states": torch.randn(1, 7, 32), "pooled_projections": torch.randn(1, 64)}
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3]), "return_dict": return_dict}
    inputs |= {} if make is dit else text
    model, returned = make(), []
    with torch.no_grad():
        expected = model(**inputs)[0]
        compile_denoisers([model], CPU, backend=lambda graph, _: lambda *args: _remembered(graph(*args), returned))
        sample = model(**inputs)[0]
    torch.testing.assert_close(sample, expected)
    assert returned and all(sample.data_ptr() != kept.data_ptr() for kept in returned)


def _remembered(outputs, returned):
    returned += outputs
    return outputs


def test_another_shape_is_said_once(as_if_captured, warned):
    models = [dit(), dit()]
    compile_denoisers(models, CPU, backend="eager")
    for size in (2, 2, 3, 2, 3):
        for model in models:
            call(model, size)
    assert len(warned) == 1 and "shape (3, 4, 8, 8) as well, number 2" in warned[0]
    assert len(as_if_captured) == 10


def test_no_step_begins_while_a_backward_pass_is_to_come(as_if_captured):
    model = dit()
    compile_denoisers([model], CPU, backend="aot_eager")
    image = torch.randn(1, 4, 8, 8)
    sample = model(image, torch.tensor([3])).sample
    assert not as_if_captured and sample.requires_grad
    sample.sum().backward()


@pytest.mark.parametrize(
    "offload",
    [
        lambda model: cpu_offload(model, CPU),
        lambda model: cpu_offload_with_hook(model, CPU),
        pytest.param(
            lambda model: model.enable_group_offload(CPU, CPU, "leaf_level"), marks=pytest.mark.group_offload
        ),
    ],
    ids=["layer by layer", "whole", "groups"],
)
def test_offloaded_weights_have_no_graphs(offload, as_if_captured, monkeypatch):
    model = dit()
    compile_denoisers([model], CPU, backend="eager")
    offload(model)
    with pytest.raises(
        ValueError, match=r"DiTModel without CUDA graphs, as .*offloading moves.*compile\(mode=.default"
    ):
        call(model)
    monkeypatch.undo()
    with torch.no_grad():
        compile_denoisers([model], CPU)  # as fits
        assert compilation_of(model).mode_on(GPU) == "default"
    with pytest.raises(ValueError, match="another than the mode 'reduce-overhead', as .*offloading moves"):
        compile_denoisers([model], GPU, mode="reduce-overhead")


def test_a_cache_has_no_graphs(as_if_captured, monkeypatch):
    model = flux()
    compile_denoisers([model], CPU, backend="eager")
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="FluxTransformer2DModel without CUDA graphs, as its cache keeps"):
        model(torch.randn(1, 16, 4))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another than the mode 'max-autotune', as its cache keeps"):
        compile_denoisers([model], GPU, mode="max-autotune")


# --- experts -------------------------------------------------------------------------------------------------------------


def test_experts_are_offloaded_or_captured(as_if_captured):
    experts = DenoiserExperts([sd3(0), sd3(1)], INTERVALS)
    pipe = RECIPES["sd3"].pipe(experts)
    experts.compile(backend="eager")
    with pytest.raises(ValueError, match="SD3Transformer2DModel without CUDA graphs, as .*offloading"):
        experts.enable_group_offload(CPU)
    pipe.enable_model_cpu_offload(device="cpu")  # Diffusers' own, which asks nobody
    with pytest.raises(ValueError, match="SD3Transformer2DModel without CUDA graphs, as .*offloading"):
        generate("sd3", pipe, num_inference_steps=2)


def test_experts_that_are_offloaded_have_no_graphs():
    experts = DenoiserExperts([sd3(0), sd3(1)], INTERVALS)
    cpu_offload_with_hook(experts, CPU)
    experts.compile()
    with torch.no_grad():
        assert compilation_of(experts.experts[1]).mode_on(GPU) == "default"


@pytest.mark.parametrize("name", ["sd3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan", "sd15"))])
def test_experts_in_a_pipeline_of_diffusers(name):
    """Of the same size: one graph. The pipeline of Wan calls them twice in each step."""
    experts = DenoiserExperts([RECIPES[name].denoiser(seed) for seed in range(2)], INTERVALS)
    pipe = RECIPES[name].pipe(experts)
    expected = generate(name, pipe, num_inference_steps=3)
    compiled = CompileCounter()
    experts.compile(backend=compiled, fullgraph=True)
    torch.testing.assert_close(generate(name, pipe, num_inference_steps=3), expected)
    assert compiled.frame_count == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [dit, sd3], ids=["DiT", "SD3"])
def test_copies_are_not_compiled(make, copied):
    model = make()
    compile_denoisers([model], CPU, backend="eager")
    assert compilation_of(model) is not None and compilation_of(copied(model)) is None
