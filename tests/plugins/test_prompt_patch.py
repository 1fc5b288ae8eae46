"""Gates, prompts and losses are those of the paper, and zero prompts change nothing."""

import copy

import pytest
import torch
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from hypothesis import given
from hypothesis import strategies as st
from prompted import gates_of
from torch import nn

from diffusers_dmp import PromptPatch, RemixDiTModel, convert_checkpoint

pytest_plugins = ["prompted_fixtures"]


# Gates and losses


@pytest.mark.parametrize("name", ["dmp_tiny", "dmp_prepend"])
@pytest.mark.parametrize("case", ["mixed_t", "same_t"])
@torch.no_grad()
def test_published_vectors(name, case):
    vectors = Vectors(name)
    model = convert_checkpoint("dmp", vectors.state_dict, vectors.config)
    x, t, y = (vectors[f"case.{case}.{key}"] for key in "xty")
    assert_matches(model(x, t, class_labels=y).sample, vectors[f"case.{case}.out"])

    embed = model.time_label_embed
    time = embed.timestep_embedder(embed.time_proj(t))
    conditioning = embed(t, y) if name == "dmp_tiny" else time
    assert_matches(PromptPatch.attached_to(model)(conditioning).gates, vectors[f"case.{case}.gates"])


@pytest.mark.parametrize("name", ["dmp_tiny", "dmp_prepend"])
@torch.no_grad()
def test_published_guidance(name):
    from diffusers_dmp.pipelines.denoiser_inputs import classifier_free_guidance

    vectors = Vectors(name)
    model = convert_checkpoint("dmp", vectors.state_dict, vectors.config)
    x = torch.cat([vectors["cfg.x"], vectors["cfg.x"]])
    output = model(x, vectors["cfg.t"], class_labels=vectors["cfg.y"]).sample
    guided = classifier_free_guidance(output, 1.5, sample_channels=4, guidance_channels=3)
    assert_matches(guided[:, :3], vectors["cfg.out"][:2, :3])


def test_all_gates_of_all_blocks_are_one_product():
    patch = randomised(PromptPatch(hidden_size=48, num_prompts=16, depth=3))
    conditioning = torch.randn(4, 48)
    expected = gates_of(conditioning, patch.gate_proj.weight, patch.gate_proj.bias, depth=3)
    torch.testing.assert_close(patch(conditioning).gates, expected)


@given(topk=st.floats(0.07, 1.0), seed=st.integers(0, 100), training=st.booleans())
def test_a_gate_selects_its_share_of_the_prompts(topk, seed, training):
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=16, depth=2, topk=topk), seed).train(training)
    gates = patch(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))).gates
    assert ((gates > 0).sum(-1) == int(topk * 16)).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))


def test_noise_changes_the_selection_in_training_alone():
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=16, depth=2, topk=0.25))
    conditioning = torch.randn(3, 8)
    assert torch.equal(patch(conditioning).gates, patch(conditioning).gates)
    patch.train()
    assert not torch.equal(patch(conditioning).gates > 0, patch(conditioning).gates > 0)


def test_importance_is_the_squared_coefficient_of_variation():
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=16, depth=2)).train()
    output = patch(torch.randn(3, 8))
    importance = output.gates.sum(0)
    assert output.importance_loss.item() == pytest.approx((importance.std() / importance.mean()).item() ** 2)
    assert output.load_loss is None  # every prompt is always selected


def test_load_is_the_smooth_count_of_how_often_a_prompt_is_selected():
    """The load of a prompt is the probability that it is selected when its own noise is sampled again."""
    torch.manual_seed(0)
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=6, depth=1, topk=0.5)).train()
    conditioning = torch.randn(1, 8)
    state = torch.get_rng_state()
    load_loss = patch(conditioning).load_loss

    torch.set_rng_state(state)
    logits = (conditioning @ patch.gate_proj.weight[:, :-1].T + patch.gate_proj.bias)[0]
    std = nn.functional.softplus(conditioning @ patch.noise_weight)[0] + 0.01
    noisy = logits + torch.randn(1, 1, 6)[0, 0] * std
    load = []
    for prompt in range(6):
        others = torch.cat([noisy[:prompt], noisy[prompt + 1 :]])
        redrawn = logits[prompt] + torch.randn(400_000) * std[prompt]
        load.append((redrawn > others.topk(3).values[-1]).float().mean())
    load = torch.stack(load)
    assert load_loss.item() == pytest.approx((load.var() / load.mean() ** 2).item(), rel=0.02)


def test_every_parameter_learns():
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=16, depth=2, topk=0.5)).train()
    output = patch(torch.randn(3, 8))
    (output.importance_loss + output.load_loss).backward()
    for name in ("gate_proj.weight", "gate_proj.bias", "noise_weight"):
        assert patch.get_parameter(name).grad.abs().max() > 0, name


def test_gate_weights(patched_dit):
    patch = PromptPatch.attached_to(patched_dit)
    timesteps = torch.tensor([0, 500, 999])
    gates = patch.gate_weights(timesteps, class_labels=torch.tensor([3]))
    conditioning = patched_dit.time_label_embed(timesteps, torch.tensor([3, 3, 3]))
    expected = gates_of(conditioning, patch.gate_proj.weight, patch.gate_proj.bias, depth=2)
    torch.testing.assert_close(gates, expected.transpose(0, 1).detach(), atol=1e-5, rtol=1e-4)
    again = patch.gate_weights(torch.tensor([500, 500, 999]), class_labels=torch.tensor([3]))
    assert torch.equal(again, gates[[1, 1, 2]])
    # in training mode and compiled, too
    patched_dit.train(), patched_dit.transformer_blocks[1].eval(), patch.train()
    patched_dit.compile_repeated_blocks(backend="aot_eager")
    torch.testing.assert_close(patch.gate_weights(timesteps, class_labels=torch.tensor([3])), gates)
    assert patched_dit.training and not patched_dit.transformer_blocks[1].training and patch.training
    patch.detach()
    with pytest.raises(ValueError, match="attached to a transformer"):
        patch.gate_weights(timesteps)


# The transformer's output


@torch.no_grad()
def test_prompts_go_to_the_first_blocks_alone(tiny_dit, batch):
    patch = randomised(PromptPatch.for_transformer(tiny_dit, depth=1, gate="none")).attach(tiny_dit)
    entered = {}
    for index, block in enumerate(tiny_dit.transformer_blocks):
        block.register_forward_pre_hook(lambda block, args, index=index: entered.update({index: args[0]}))
    tokens = tiny_dit.pos_embed(batch["hidden_states"])
    left = []
    tiny_dit.transformer_blocks[0].register_forward_hook(lambda block, args, output: left.append(output))
    tiny_dit(**batch)
    torch.testing.assert_close(entered[0], tokens + patch.prompts[0])
    assert torch.equal(entered[1], left[0])


@torch.no_grad()
def test_new_prompts_change_nothing(transformer, inputs):
    before = transformer(**inputs).sample
    PromptPatch.for_transformer(transformer).attach(transformer)
    # up to rounding, as PyTorch may take other kernels for frozen parameters
    torch.testing.assert_close(transformer(**inputs).sample, before)


@torch.no_grad()
def test_trained_prompts_change_every_sample(transformer, inputs):
    before = transformer(**inputs).sample
    randomised(PromptPatch.for_transformer(transformer)).attach(transformer)
    after = transformer(**inputs).sample
    assert ((after - before).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("mode", ["add", "prepend"])
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(transformer, inputs, mode):
    num_prompts = None if mode == "add" else 3
    randomised(PromptPatch.for_transformer(transformer, num_prompts, mode=mode)).attach(transformer)
    together = transformer(**inputs).sample
    for i in range(4):
        alone = transformer(**{name: value[i : i + 1] for name, value in inputs.items()}).sample
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_prepended_prompts_take_any_size(tiny_dit):
    randomised(PromptPatch.for_transformer(tiny_dit, num_prompts=3, mode="prepend")).attach(tiny_dit)
    assert tiny_dit(torch.randn(1, 4, 16, 16), 5).sample.shape == (1, 8, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtypes(transformer, inputs, dtype):
    """Also where the prompts stay in float32, as in training on half-precision weights."""
    patch = randomised(PromptPatch.for_transformer(transformer)).attach(transformer)
    full = transformer(**inputs).sample
    transformer.to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    outputs = [transformer(**inputs).sample]
    patch.to(dtype)
    outputs.append(transformer(**inputs).sample)
    for output in outputs:
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), full, atol=0.1, rtol=0.1)


def test_autocast(patched_dit, batch):
    patch = PromptPatch.attached_to(patched_dit).train()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = patched_dit(**batch)
    torch.manual_seed(0)
    full = patched_dit(**batch).sample
    torch.testing.assert_close(output.sample.float(), full, atol=0.05, rtol=0.05)
    (output.sample.float().square().mean() + output.importance_loss).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in patch.parameters())


def test_losses_join_the_output_in_training_alone(transformer, inputs):
    patch = PromptPatch.for_transformer(transformer, topk=0.5).attach(transformer).eval()
    assert list(transformer(**inputs)) == ["sample"]
    patch.train()
    output = transformer(**inputs)
    assert list(output) == ["sample", "importance_loss", "load_loss"]
    assert output.importance_loss.shape == output.load_loss.shape == ()
    assert len(transformer(**inputs, return_dict=False)) == 3
    assert type(output) is type(patch.detach() and transformer(**inputs))


def test_a_remix_dit_returns_its_own_loss_as_well(batch):
    model = RemixDiTModel(**TINY_CONFIG).train()
    PromptPatch.for_transformer(model).attach(model).train()
    assert list(model(**batch)) == ["sample", "prior_loss", "importance_loss"]


def test_prompt_tuning_has_neither_gate_nor_losses(tiny_dit, batch):
    patch = PromptPatch.for_transformer(tiny_dit, gate="none").attach(tiny_dit).train()
    assert list(patch.state_dict()) == ["prompts"]
    assert list(tiny_dit(**batch)) == ["sample"]
    with pytest.raises(ValueError, match="prompts with a `gate`, but got 'none'"):
        patch(torch.randn(1, 48))


@pytest.mark.parametrize("mode", ["add", "prepend"])
def test_base_parameters_receive_no_gradient(transformer, inputs, mode):
    """Even if the optimiser gets them; and no gradient of a weight is computed on the way."""
    patch = randomised(PromptPatch.for_transformer(transformer, mode=mode)).attach(transformer).train()
    before = copy.deepcopy(transformer.state_dict())
    optimizer = torch.optim.AdamW([*transformer.parameters(), *patch.parameters()], lr=0.1, weight_decay=0.1)
    output = transformer(**inputs)
    wanting = _accumulating(output.sample.grad_fn)
    (output.sample.square().mean() + output.importance_loss).backward()
    optimizer.step()
    assert {id(leaf) for leaf in wanting} <= {id(parameter) for parameter in patch.parameters()}
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in patch.parameters())
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def _accumulating(node) -> list[torch.Tensor]:
    """Return the leaves whose gradients an autograd graph computes."""
    seen, leaves, waiting = set(), [], [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


# Configurations


def test_round_trip(tmp_path):
    patch = randomised(PromptPatch(48, 16, 2, topk=0.5, base_model_name_or_path="facebook/DiT-XL-2-256"))
    patch.save_pretrained(tmp_path)
    loaded = PromptPatch.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in patch.config.items() if not name.startswith("_"))
    assert all(torch.equal(value, patch.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"topk": 0.0}, r"`topk` to be in \(0, 1\] and to select one of 16 prompts, but got 0.0"),
        ({"topk": 1.5}, r"`topk` to be in \(0, 1\].* but got 1.5"),
        ({"topk": 0.01}, "select one of 16 prompts, but got 0.01"),
        ({"mode": "replace"}, "`mode` to be one of add, prepend, but got 'replace'"),
        ({"gate": "mlp"}, "`gate` to be one of linear, none, but got 'mlp'"),
        ({"depth": 0}, "`depth` to be at least 1, but got 0"),
        ({"num_prompts": 1}, "`num_prompts` to be at least 2"),
    ],
)
def test_invalid_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        PromptPatch(**{"hidden_size": 48, "num_prompts": 16, "depth": 2} | config)
