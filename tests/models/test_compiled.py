"""Models that are compiled but for the choice of an expert, and modulations that are computed ahead of time."""

import copy

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_dmp import DiTModel, DTRTransformer2DModel, PatchedUNet2DModel, PromptPatch, RemixDiTModel

MODELS = {
    "DiT": lambda: randomised(DiTModel(**TINY_CONFIG)),
    "DTR": lambda: randomised(DTRTransformer2DModel(**TINY_CONFIG)),
    "Remix-DiT": lambda: randomised(RemixDiTModel(**TINY_CONFIG, num_bases=3, num_experts=7)),
}
aten = torch.ops.aten
TIMESTEPS = torch.tensor([999, 500, 20, 0])


@pytest.fixture(params=MODELS)
def model(request):
    torch.compiler.reset()
    return MODELS[request.param]().eval()


@pytest.fixture
def inputs(batch):
    return {name: batch[name] for name in ("hidden_states", "class_labels")}


@torch.no_grad()
def sample_all(model, inputs, modulations=None):
    """The outputs at all timesteps, each shared by the batch."""
    size = len(inputs["class_labels"])
    given = [{}] * len(TIMESTEPS) if modulations is None else [{"modulations": each} for each in modulations]
    return torch.stack([model(**inputs, timestep=t.expand(size), **own).sample for t, own in zip(TIMESTEPS, given)])


def test_modulations_ahead_of_time_are_those_of_each_timestep(model, inputs):
    modulations = model.modulations_at(TIMESTEPS, inputs["class_labels"])
    torch.testing.assert_close(sample_all(model, inputs, modulations), sample_all(model, inputs))
    # a model without them reads others
    assert not torch.allclose(sample_all(model, inputs, modulations.flip(0)), sample_all(model, inputs), atol=1e-2)


@torch.no_grad()
def test_modulations_of_a_shared_label_serve_any_batch(model, batch):
    """Also one of several timesteps, which a Remix-DiT sorts by expert, if all have the modulations that are given."""
    shared = batch | {"class_labels": torch.full((4,), 7)}
    known = model.modulations_at(TIMESTEPS[:1], torch.tensor([7]))[0]
    expected = model(**shared, modulations=known.expand(-1, -1, 4, -1, -1)).sample
    assert (expected - model(**shared).sample).abs().max() > 1e-3
    torch.testing.assert_close(model(**shared, modulations=known).sample, expected)


def test_modulations_that_do_not_fit_are_refused(model, inputs):
    modulations = model.modulations_at(TIMESTEPS, inputs["class_labels"])
    call = inputs | {"timestep": TIMESTEPS[0]}
    with pytest.raises(ValueError, match="only under `torch.no_grad"):
        model(**call, modulations=modulations[0])
    of_one = modulations[0]
    for wrong in (modulations, of_one[:1], of_one[:, :, :2], of_one[:, :, :, 0], of_one[..., 1:]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"\(2, 6, 4, 1, 48\) or.*but got the shape"):
            model(**call, modulations=wrong)
    with pytest.raises(ValueError, match="timestep"):
        model.modulations_at(torch.tensor([1001]), inputs["class_labels"])
    with pytest.raises(ValueError, match=r"class_labels.*\[0, 11\)"):
        model.modulations_at(TIMESTEPS, torch.tensor([11]))


def check_one_graph(model, inputs):
    """One graph computes what the eager model does, at all timesteps."""
    expected = sample_all(model, inputs)
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(sample_all(model, inputs), expected)
    assert counter.frame_count == 1


def test_one_graph_serves_all_experts_and_timesteps(model, inputs):
    check_one_graph(model, inputs)
    assert model.is_compiled and not copy.deepcopy(model).is_compiled


def make_prompted():
    model = randomised(DiTModel(**TINY_CONFIG | {"num_layers": 1}))
    randomised(PromptPatch.for_transformer(model), seed=1).attach(model)
    return model


def make_unet():
    return randomised(PatchedUNet2DModel(sample_size=8, in_channels=4, patch_size=2, model_channels=32, channel_multipliers=(1,),
                                         layers_per_block=1, attention_levels=(), attention_head_dim=16, num_classes=10))  # fmt: skip


@pytest.mark.parametrize("make", [make_prompted, pytest.param(make_unet, marks=pytest.mark.slow)])
def test_prompts_and_patches_need_one_graph_for_all_timesteps_too(make, inputs):
    torch.compiler.reset()
    model = make()
    names = ("sample", "class_labels") if make is make_unet else inputs
    inputs = dict(zip(names, inputs.values()))
    check_one_graph(model, inputs)


@torch.no_grad()
def test_all_weights_are_static_inputs_of_the_graph(model, inputs):
    """A CUDA graph reads static inputs where they are, and copies all others at each replay."""
    copied = []

    def compiler(graph, example_inputs):
        static = TracingContext.get().fw_metadata.static_input_indices  # what Inductor asks
        copied.append(sum(x.numel() for i, x in enumerate(example_inputs) if i not in static))
        return graph.forward

    model.compile(backend=aot_autograd(fw_compiler=compiler, inference_compiler=compiler), fullgraph=True)
    sample_all(model, inputs)
    num_inputs = sum(map(torch.numel, inputs.values())) + 1  # and the timestep
    assert copied == [num_inputs]


# Training a Remix-DiT


def compile_whole(model, **options):
    model.compile(**options)


def compile_blocks(model, **options):
    model.compile_repeated_blocks(**options)


@pytest.fixture
def remix():
    torch.compiler.reset()
    return MODELS["Remix-DiT"]().train()


def gradients(model, inputs, **timesteps):
    model.zero_grad()
    drop_none = torch.zeros(len(inputs["class_labels"]), dtype=torch.bool)
    output = model(**inputs, **timesteps, force_drop_ids=drop_none)
    (output.sample.square().mean() + output.prior_loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compile, backend", [(compile_whole, "eager"), (compile_blocks, "aot_eager")])
def test_experts_in_turn_are_trained_by_one_graph(remix, inputs, compile, backend):
    steps = [{"timestep": remix.intervals.sample(expert, 4), "expert": expert} for expert in (5, 0, 6, 1)]
    steps.append({"timestep": torch.tensor([3, 250, 600, 999])})  # several experts at once: computed eagerly
    expected = [gradients(remix, inputs, **step) for step in steps]
    counter = CompileCounterWithBackend(backend)
    compile(remix, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, eager in zip(steps, expected):
            torch.testing.assert_close(gradients(remix, inputs, **step), eager, atol=1e-6, rtol=1e-4)
    assert counter.frame_count == 1


def matrix_products(block, *inputs) -> tuple[int, int]:
    """The numbers of matrix products in the graphs of a block's forward and backward passes, under autocast."""
    counts = []

    def compiler(graph, example_inputs):
        counts.append(sum(node.target in (aten.mm.default, aten.addmm.default) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    with torch.autocast("cpu", torch.bfloat16):
        output = torch.compile(block, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))(*inputs)
    output.sum().backward()
    return tuple(counts)


def test_in_a_graph_the_bases_are_mixed_without_a_matrix_product(remix):
    """What is done to each element is fused with the conversion to half precision; a matrix product would write all in float32."""
    plain = MODELS["DiT"]().train()
    tokens, conditioning = torch.randn(2, 16, 48, requires_grad=True), torch.randn(2, 48, requires_grad=True)
    expected = matrix_products(plain.transformer_blocks[0], tokens, conditioning)
    coefficients = remix.mixing_coefficients[:1]
    assert matrix_products(remix.transformer_blocks[0], tokens, conditioning, coefficients) == expected
    assert min(expected) > 0


class WeightsRead(TorchDispatchMode):
    """Counts the bytes of the weights that operations read; of an embedding they read one row only."""

    def __init__(self, model):
        super().__init__()
        self.sizes = {weight.untyped_storage()._cdata: weight.nbytes for weight in model.parameters()}
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (aten.t.default, aten.embedding.default):
            tensors = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, torch.Tensor)]
            self.num_bytes += sum(self.sizes.get(each.untyped_storage()._cdata, 0) for each in tensors)
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_third_of_the_weights_is_not_read_where_modulations_are_known():
    with torch.device("meta"):
        model = DiTModel.from_preset("DiT-XL/2", num_layers=4).eval()
        inputs = torch.empty(2, 4, 32, 32), torch.empty(2, dtype=torch.long), torch.empty(2, dtype=torch.long)
    read = []
    for modulations in (None, model.modulations_at(*inputs[1:])[0]):
        with WeightsRead(model) as weights:
            model(*inputs, modulations=modulations)
        read.append(weights.num_bytes)
    rows = model.time_label_embed.class_embedder.weight.nbytes
    assert read[0] == sum(weight.nbytes for weight in model.parameters() if weight.requires_grad) - rows
    assert read[1] / read[0] < 0.69
