"""Around blocks: slices compute what masks compute, with as many operations as are counted here, and gradients are autograd's."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import TINY_CONFIG, randomised
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dmp import ClassConditionalPipeline, DiTModel, DTRTransformer2DModel, PromptPatch
from diffusers_dmp.models import ChannelRouting, channel_routing
from diffusers_dmp.models.channel_routing import ChannelWindow, split_channels

CLEAN, MIDDLE, NOISY = 3, 700, 999  # with inactive channels after the window, on both sides of it, and before it


def masked(model: DTRTransformer2DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sample of a model whose channels are masked, as those of a batch with several timesteps are."""
    model = model.requires_grad_(False)
    with torch.enable_grad():
        return model(**inputs).sample


@settings(max_examples=25)
@given(
    sharing_ratio=st.floats(0.05, 1.0),
    alpha=st.floats(0.1, 8.0),
    timestep=st.one_of(st.sampled_from([0, 999]), st.integers(0, 999), st.floats(0, 1000)),
    batch_size=st.integers(1, 3),
)
@torch.no_grad()
def test_slices_compute_what_masks_compute(sharing_ratio, alpha, timestep, batch_size):
    """Bit for bit, as the sums are the same."""
    model = randomised(DTRTransformer2DModel(**TINY_CONFIG, sharing_ratio=sharing_ratio, routing_alpha=alpha))
    timestep = torch.tensor(timestep)
    assert isinstance(model.choose(timestep[None])[0], ChannelWindow)
    inputs = {
        "hidden_states": torch.randn(batch_size, 4, 8, 8),
        "timestep": timestep.expand(batch_size),
        "class_labels": torch.arange(batch_size),
    }
    given_image = inputs["hidden_states"].clone()
    assert torch.equal(model(**inputs).sample, masked(model, inputs))
    assert torch.equal(inputs["hidden_states"], given_image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("timestep", [CLEAN, MIDDLE, NOISY])
@torch.no_grad()
def test_slices_compute_what_masks_compute_in_half_precision(tiny_dtr, batch, dtype, timestep):
    tiny_dtr.to(dtype)
    batch |= {"timestep": torch.tensor(timestep).expand(4), "hidden_states": batch["hidden_states"].to(dtype)}
    assert torch.equal(tiny_dtr(**batch).sample, masked(tiny_dtr, batch))


@given(dim=st.integers(1, 64), sharing_ratio=st.floats(0.05, 1.0), timestep=st.floats(0, 1000))
def test_a_window_has_the_channels_of_the_masks(dim, sharing_ratio, timestep):
    if int(dim * sharing_ratio) == 0:
        return
    routing = ChannelRouting(dim, sharing_ratio, 4.0, 1000)
    window = routing.window_at(timestep)
    active = routing(torch.tensor([timestep], dtype=torch.float64)).float()[:, None]
    assert all(torch.equal(*pair) for pair in zip(window.masks_for(torch.empty(2, 3, dim)), (active, 1 - active)))
    channels = torch.arange(dim).expand(2, 3, dim)
    found = [channel for part in window.inactive_of(channels) for channel in part[0, 0].tolist()]
    assert found == (active == 0).flatten().nonzero().flatten().tolist()


# Where the channels are masked


def choices(model: DTRTransformer2DModel, *timesteps: int) -> tuple:
    with torch.no_grad():
        return model.choose(torch.tensor(timesteps))


def test_timesteps_of_each_sample_and_gradients_need_masks(tiny_dtr):
    assert choices(tiny_dtr, MIDDLE) and not choices(tiny_dtr, MIDDLE, MIDDLE)
    assert not tiny_dtr.choose(torch.tensor([MIDDLE]))
    assert not choices(DTRTransformer2DModel(**TINY_CONFIG, routing="random"), MIDDLE)


def test_compiled_models_and_blocks_have_masks(tiny_dtr):
    tiny_dtr.compile(backend="eager")
    assert not choices(tiny_dtr, MIDDLE)
    by_blocks = DTRTransformer2DModel(**TINY_CONFIG)
    by_blocks.compile_repeated_blocks(backend="eager")
    assert not choices(by_blocks, MIDDLE)


def test_blocks_that_others_call_have_masks(tiny_dtr):
    """Accelerate's hooks, as of offloading; those of Diffusers replace `forward` as well."""
    add_hook_to_module(tiny_dtr.transformer_blocks[1], ModelHook())
    assert not choices(tiny_dtr, MIDDLE)
    remove_hook_from_module(tiny_dtr.transformer_blocks[1])
    tiny_dtr.transformer_blocks[0] = nn.Identity()
    assert not choices(tiny_dtr, MIDDLE)


def recorder(seen: list) -> Callable:
    return lambda module, args, output: seen.append((args[0], output))


@torch.no_grad()
def test_whoever_watches_a_block_sees_all_channels(tiny_dtr, batch):
    batch["timestep"] = torch.tensor(MIDDLE).expand(4)
    seen = []
    handle = tiny_dtr.transformer_blocks[1].register_forward_hook(recorder(seen))
    expected = tiny_dtr(**batch).sample
    handle.remove()
    own, block = recorder(seen), tiny_dtr.transformer_blocks[1]
    handle = register_module_forward_hook(lambda module, *call: own(module, *call) if module is block else None)
    tiny_dtr(**batch)
    handle.remove()
    for tokens, output in seen:
        assert (tokens != 0).all() and (output != 0).all()
    assert len(seen) == 2 and choices(tiny_dtr, MIDDLE)
    assert torch.equal(tiny_dtr(**batch).sample, expected)


@torch.no_grad()
def test_what_the_embedding_returned_is_not_changed(tiny_dtr, batch):
    batch["timestep"] = torch.tensor(MIDDLE).expand(4)
    tiny_dtr.to(memory_format=torch.channels_last)  # or else the tokens would be copied because of their layout
    seen = []
    tiny_dtr.pos_embed.register_forward_hook(recorder(seen))
    assert choices(tiny_dtr, MIDDLE)
    tiny_dtr(**batch)
    assert (seen[0][1] != 0).all()


@pytest.mark.parametrize("mode", ["add", "prepend"])
@torch.no_grad()
def test_prompts_are_masked_as_before(tiny_dtr, batch, mode):
    """They are added to the tokens, or put before them, and then the block reads its active channels of all."""
    batch["timestep"] = torch.tensor(MIDDLE).expand(4)
    patch = randomised(PromptPatch.for_transformer(tiny_dtr, mode=mode), seed=1).attach(tiny_dtr)
    assert not choices(tiny_dtr, MIDDLE)
    torch.testing.assert_close(tiny_dtr(**batch).sample, masked(tiny_dtr, batch))
    patch.detach()
    assert choices(tiny_dtr, MIDDLE)


def on_an_accelerator(pretended, model: DTRTransformer2DModel, batch: dict) -> tuple[torch.Tensor, list[str]]:
    """The sample of a batch that shares its timestep, known on the CPU, and what the CPU waited for until it was computed."""
    accelerator = pretended.PretendedAccelerator()
    there = {name: accelerator.put(batch[name]) for name in ("hidden_states", "class_labels")}
    with accelerator, torch.no_grad():
        sample = accelerator.put(model)(**there, timestep=torch.tensor(MIDDLE).expand(4)).sample
        waits = list(accelerator.waits)
        return sample.cpu(), waits


@pytest.mark.parametrize("smallest", [0, 1_000_000])
def test_no_window_is_waited_for_on_an_accelerator(pretended, monkeypatch, tiny_dtr, batch, smallest):
    """Small tensors are masked there, large ones sliced."""
    monkeypatch.setattr(channel_routing, "MIN_ELEMENTS_BOUND_BY_MEMORY", smallest)
    expected = masked(tiny_dtr, batch | {"timestep": torch.tensor(MIDDLE).expand(4)})
    sample, waits = on_an_accelerator(pretended, tiny_dtr, batch)
    torch.testing.assert_close(sample, expected)
    assert waits == []


# The number of operations


class CountOperations(TorchDispatchMode):
    """Counts what is computed: every operation but views and allocations."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.counts[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return output


def own_operations_of_a_block(timesteps: list[int], gradients: bool = False) -> Counter[str]:
    """What a block of a DTR computes and a block of a DiT does not, found by models of two blocks and of three."""
    of_a_block = []
    for model_class in (DTRTransformer2DModel, DiTModel):
        counted = []
        for num_layers in (3, 2):
            model = randomised(model_class(**TINY_CONFIG | {"num_layers": num_layers}))
            with torch.set_grad_enabled(gradients), CountOperations() as counter:
                sample = model(torch.randn(2, 4, 8, 8), torch.tensor(timesteps), torch.tensor([1, 2])).sample
                if gradients:
                    sample.sum().backward()
            counted.append(counter.counts)
        of_a_block.append(counted[0] - counted[1])
    routed, plain = of_a_block
    assert plain - routed == Counter()
    return routed - plain


@pytest.mark.parametrize(
    ("timesteps", "operations"),
    [
        ([CLEAN], {"add_": 1, "zero_": 1}),
        ([MIDDLE], {"add_": 2, "zero_": 2}),
        ([NOISY], {"add_": 1, "zero_": 1}),
        ([CLEAN, MIDDLE], {"mul": 1, "addcmul_": 1}),
    ],
)
def test_operations_of_sampling(timesteps, operations):
    """On slices of a fifth of the channels, or on masks of all."""
    assert own_operations_of_a_block(timesteps) == Counter(operations)


@pytest.fixture
def large(monkeypatch):
    """All tensors count as so large that memory traffic decides, also on the CPU."""
    monkeypatch.setattr(channel_routing, "is_bound_by_memory", lambda hidden_states: True)


def test_operations_of_training():
    """In the backward pass: ∂out ⊙ (1 - m) and its factor, ∂read ⊙ m, and their sum."""
    own = own_operations_of_a_block([CLEAN, MIDDLE], gradients=True)
    assert own == Counter({"addcmul_": 1, "mul": 4, "add": 1})


def test_operations_of_training_on_large_tensors(large):
    forward, backward = {"mul": 1, "addcmul": 1}, {"where": 1, "_to_copy": 1}  # of a mask (B, 1, D) to Booleans
    assert own_operations_of_a_block([CLEAN, MIDDLE], gradients=True) == Counter(forward | backward)


# Gradients


def block(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return read + torch.tanh(read @ weight)


def masks(*timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    active = ChannelRouting(6, 0.5, 1.0, 1000)(torch.tensor(timesteps))[:, None].double()
    return active, 1 - active


def routed(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Two blocks."""
    for _ in range(2):
        read, bypass = split_channels(hidden_states, *masks(CLEAN, MIDDLE))
        hidden_states = bypass.join(block(read, weight))
    return hidden_states


def by_formula(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    active, inactive = masks(CLEAN, MIDDLE)
    for _ in range(2):
        hidden_states = block(active * hidden_states, weight) + inactive * hidden_states
    return hidden_states


@pytest.fixture
def tokens_and_weight() -> tuple[torch.Tensor, torch.Tensor]:
    shapes = (2, 3, 6), (6, 6)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def test_gradients_are_those_of_the_formula(large, tokens_and_weight):
    factor = torch.randn(2, 3, 6, dtype=torch.float64)
    actual, expected = (
        torch.autograd.grad((function(*tokens_and_weight) * factor).sum(), tokens_and_weight)
        for function in (routed, by_formula)
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_gradients_of_gradients_and_in_forward_mode(large, tokens_and_weight):
    assert torch.autograd.gradcheck(routed, tokens_and_weight, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(routed, tokens_and_weight)


def test_forward_mode_with_gradients(large, tokens_and_weight):
    tokens, weight = tokens_and_weight
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, torch.randn_like(tokens))
        tangents = [torch.autograd.forward_ad.unpack_dual(each(dual, weight)).tangent for each in (routed, by_formula)]
    torch.testing.assert_close(*tangents)


def test_functional_derivatives(large, tokens_and_weight):
    """As objectives of flow maps need them: a derivative by the time, with gradients of it."""
    tokens, weight = tokens_and_weight
    _, tangent = torch.func.jvp(lambda x: routed(x, weight), (tokens,), (torch.ones_like(tokens),))
    _, expected = torch.func.jvp(lambda x: by_formula(x, weight), (tokens,), (torch.ones_like(tokens),))
    torch.testing.assert_close(tangent, expected)
    (gradient,) = torch.autograd.grad(tangent.sum(), weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), weight)[0])
    per_sample = [torch.func.vmap(torch.func.grad(lambda x, function=function: function(x, weight)[0].sum()))(
        tokens[:, None].expand(-1, 2, -1, -1)) for function in (routed, by_formula)]  # fmt: skip
    torch.testing.assert_close(*per_sample)


def gradients_of(model: DTRTransformer2DModel, batch: dict) -> list[torch.Tensor]:
    model.zero_grad()
    model(**batch).sample.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.slow
def test_a_model_compiled_with_its_gradients(large, tiny_dtr, batch):
    expected = gradients_of(tiny_dtr, batch)
    torch.compiler.reset()
    tiny_dtr.compile(backend="aot_eager", fullgraph=True)
    for actual, eager in zip(gradients_of(tiny_dtr, batch), expected):
        torch.testing.assert_close(actual, eager)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_large_tensors_are_those_of_small_ones(monkeypatch, tiny_dtr, batch, checkpointing, dtype):
    """Also of a residual stream in float32 under autocast."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = gradients_of(tiny_dtr, batch)
        monkeypatch.setattr(channel_routing, "is_bound_by_memory", lambda hidden_states: True)
        if checkpointing:
            tiny_dtr.enable_gradient_checkpointing()
        actual = gradients_of(tiny_dtr.train(), batch | {"force_drop_ids": torch.zeros(4, dtype=torch.bool)})
    for large, small in zip(actual, expected):
        torch.testing.assert_close(large, small)


# In a pipeline


def test_a_pipeline_samples_the_same_by_slices(tiny_dtr):
    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        labels = {"class_labels": [1, 3], "guidance_scale": 1.5}
        return pipeline(**labels, num_inference_steps=4, generator=generator, output_type="pt").images

    pipeline = ClassConditionalPipeline(tiny_dtr, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    chosen = []
    choose = tiny_dtr.choose
    tiny_dtr.choose = lambda timestep: chosen.append(choose(timestep)) or chosen[-1]
    by_slices = sample()
    assert len(chosen) == 4 and all(chosen)
    tiny_dtr.choose = lambda timestep: ()
    assert torch.equal(sample(), by_slices)
