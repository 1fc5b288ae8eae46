"""Compiled code notices when hooks come and go, and that of other models stays as it is."""

import inspect

import pytest
import torch
from accelerate import hooks
from conftest import TINY_CONFIG, randomised
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from diffusers_dmp import DiTModel, PromptPatch
from diffusers_dmp.plugins.hooks import ForwardHooks

pytest_plugins = ["prompted_fixtures"]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(patched_dit, batch, fullgraph):
    patch = PromptPatch.attached_to(patched_dit)
    with torch.no_grad():
        patched = patched_dit(**batch).sample
        compiled = torch.compile(patched_dit, fullgraph=fullgraph, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).sample, patched)
        patch.detach()
        torch.testing.assert_close(compiled(**batch).sample, patched_dit(**batch).sample)
    patch.attach(patched_dit).train()
    torch.manual_seed(0)
    output = compiled(**batch)
    torch.manual_seed(0)
    torch.testing.assert_close(output.importance_loss, patched_dit(**batch).importance_loss)
    output.sample.sum().backward()
    assert patch.prompts.grad.abs().max() > 0


@torch.no_grad()
def test_attached_to_what_was_compiled(tiny_dit, batch):
    tiny_dit.requires_grad_(False)  # or else freezing would be enough for it to be compiled again
    plain = tiny_dit(**batch).sample
    compiled = torch.compile(tiny_dit, backend="aot_eager")
    compiled(**batch)
    patch = randomised(PromptPatch.for_transformer(compiled)).attach(compiled)
    assert patch.transformer is tiny_dit and PromptPatch.attached_to(compiled) is patch
    patched = tiny_dit(**batch).sample
    torch.testing.assert_close(compiled(**batch).sample, patched)
    assert (patched - plain).abs().max() > 1e-3
    patch.detach()
    torch.testing.assert_close(compiled(**batch).sample, plain)


class CountingBackend:
    """A backend for `torch.compile` that counts the graphs that it gets."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list):
        self.graphs += 1
        return graph.forward


class Wrapper(nn.Module):
    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, **inputs):
        return self.wrapped(**inputs)


@pytest.mark.parametrize("compiled", ["transformer", "in place", "blocks", "wrapper"])
@torch.no_grad()
def test_other_models_stay_compiled(batch, compiled):
    """Of the transformer itself, code for both states is reused when its prompts come back, or others like them."""
    own, others = CountingBackend(), CountingBackend()
    # frozen, or else attaching would be noticed by the freezing
    dit, other = (
        randomised(DiTModel(**TINY_CONFIG | {"num_layers": 1}), seed).requires_grad_(False) for seed in (0, 1)
    )
    model = dit
    if compiled == "transformer":
        model = torch.compile(dit, backend=own)
    elif compiled == "in place":
        dit.compile(backend=own)
    elif compiled == "blocks":
        dit.compile_repeated_blocks(backend=own)
    else:
        model = torch.compile(Wrapper(dit), backend=own)
    compiled_other = torch.compile(other, backend=others)
    compiled_other(**batch)
    graphs = others.graphs
    assert graphs > 0

    def check() -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            expected = dit(**batch).sample
        torch.testing.assert_close(model(**batch).sample, expected)
        torch.testing.assert_close(compiled_other(**batch).sample, other(**batch).sample)
        assert others.graphs == graphs
        return expected

    plain = check()
    patch = randomised(PromptPatch.for_transformer(dit)).attach(dit)
    assert (check() - plain).abs().max() > 1e-3
    patch.detach()
    torch.testing.assert_close(check(), plain)
    own_graphs = own.graphs
    patch.attach(dit)
    check()
    patch.detach()
    randomised(PromptPatch.for_transformer(dit), seed=1).attach(dit)
    check()
    if compiled != "wrapper":  # PyTorch checks the id of the hook that is always called, where it is part of the graph
        assert own.graphs == own_graphs


class Doubled(ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return 2 * output


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
@torch.no_grad()
def test_forwards_that_others_have_set(order):
    """Diffusers' hooks replace `forward`, too. Both kinds work and are removed in any order."""
    model = nn.Sequential(nn.Linear(2, 2))
    layer, x = model[0], torch.ones(1, 2)
    plain = layer(x)
    compiled = torch.compile(model, backend="eager")

    def assert_factor(factor: float) -> None:
        torch.testing.assert_close(layer(x), factor * plain)
        torch.testing.assert_close(compiled(x), factor * plain)

    def attach_theirs() -> None:
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(Doubled(), "doubled")

    def attach_ours() -> ForwardHooks:
        hooks = ForwardHooks()
        hooks.after(layer, lambda module, args, output: 3 * output)
        return hooks

    assert_factor(1)
    if order == "theirs first":
        attach_theirs()
        assert_factor(2)
        theirs = layer.forward
        hooks = attach_ours()
    else:
        hooks = attach_ours()
        assert_factor(3)
        attach_theirs()
        theirs = layer.forward
    assert_factor(2 * 3)
    hooks.remove()
    assert layer.forward is theirs
    assert_factor(2)
    hooks = attach_ours()
    layer._diffusers_hook.remove_hook("doubled")
    assert_factor(3)
    hooks.remove()
    assert_factor(1)


@torch.no_grad()
def test_repeated_blocks_are_compiled_once(batch):
    model = randomised(DiTModel(**TINY_CONFIG | {"num_layers": 12}))
    randomised(PromptPatch.for_transformer(model)).attach(model)
    patched = model(**batch).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(model(**batch).sample, patched)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("compiled", ["blocks", "transformer"])
def test_gradient_checkpointing_of_what_is_compiled(patched_dit, batch, compiled):
    patch = PromptPatch.attached_to(patched_dit)
    other = batch | {"timestep": batch["timestep"].flip(0), "hidden_states": 2 * batch["hidden_states"]}

    def gradients(model) -> list[torch.Tensor]:
        patch.zero_grad()
        sum(model(**each).sample.square().mean() for each in (batch, other)).backward()
        return [parameter.grad for name, parameter in patch.named_parameters() if name != "noise_weight"]

    plain = [gradient.clone() for gradient in gradients(patched_dit)]
    patched_dit.enable_gradient_checkpointing()
    model = patched_dit
    if compiled == "blocks":
        model.compile_repeated_blocks(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    # the largest gradient is about 1e-3
    torch.testing.assert_close(gradients(model), plain, atol=1e-6, rtol=1e-4)


def test_a_forward_that_others_have_set_keeps_its_signature(tiny_dit):
    """Offloading sets one, and pipelines read which arguments it takes."""
    hooks.add_hook_to_module(tiny_dit, hooks.ModelHook())
    expected = inspect.signature(tiny_dit.forward)
    prompts = PromptPatch.for_transformer(tiny_dit).attach(tiny_dit)
    assert inspect.signature(tiny_dit.forward) == expected and "timestep" in expected.parameters
    prompts.detach()
    assert inspect.signature(tiny_dit.forward) == expected
