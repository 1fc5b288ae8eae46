"""A patch changes what it is attached to by its prompts alone, and comes off again without a trace."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import TINY_CONFIG, Vectors, assert_matches, randomised
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, PixArtTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusers_dmp import (
    ClassConditionalPipeline,
    Conditioning,
    DiTModel,
    DTRTransformer2DModel,
    PromptPatch,
    RemixDiTModel,
    TransformerLayout,
    convert_checkpoint,
    register_layout,
)
from diffusers_dmp.plugins import layouts

SIZES = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2, "sample_size": 8}
TRANSFORMERS = {
    DiTModel: TINY_CONFIG,
    DTRTransformer2DModel: TINY_CONFIG,
    RemixDiTModel: TINY_CONFIG,
    DiTTransformer2DModel: SIZES | {"num_embeds_ada_norm": 10},
    PixArtTransformer2DModel: SIZES | {"cross_attention_dim": 48, "caption_channels": 20},
}


@pytest.fixture(params=TRANSFORMERS, ids=lambda cls: cls.__name__)
def transformer(request) -> nn.Module:
    return randomised(request.param(**TRANSFORMERS[request.param]))


@pytest.fixture
def inputs(transformer, batch) -> dict:
    """Four samples of different timesteps, by name, as all five transformers understand them."""
    if isinstance(transformer, PixArtTransformer2DModel):
        del batch["class_labels"]
        batch["encoder_hidden_states"] = torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(2))
    return batch


@pytest.fixture
def patched_dit(tiny_dit) -> DiTModel:
    """A DiT whose patch does something."""
    randomised(PromptPatch.for_transformer(tiny_dit)).attach(tiny_dit)
    return tiny_dit


def gates_of(conditioning: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, depth: int) -> torch.Tensor:
    """The formula, one block at a time."""
    blocks = []
    for block in range(depth):
        with_depth = torch.cat([conditioning, torch.full((len(conditioning), 1), float(block))], dim=1)
        blocks.append((with_depth @ weight.T + bias).softmax(-1))
    return torch.stack(blocks)


# What it computes


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
def test_a_gate_keeps_its_share_of_the_prompts(topk, seed, training):
    patch = randomised(PromptPatch(hidden_size=8, num_prompts=16, depth=2, topk=topk), seed).train(training)
    gates = patch(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))).gates
    assert ((gates > 0).sum(-1) == int(topk * 16)).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 3))


def test_noise_moves_the_choice_in_training_alone():
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
    assert output.load_loss is None  # every prompt is always kept


def test_load_is_the_smooth_count_of_how_often_a_prompt_is_kept():
    """The load of a prompt is the chance that it is kept when its own noise is drawn again."""
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


# Identity, and freezing


@torch.no_grad()
def test_a_new_patch_changes_nothing(transformer, inputs):
    before = transformer(**inputs).sample
    PromptPatch.for_transformer(transformer).attach(transformer)
    assert torch.equal(transformer(**inputs).sample, before)


@torch.no_grad()
def test_a_trained_patch_changes_every_sample(transformer, inputs):
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


@pytest.mark.parametrize("mode", ["add", "prepend"])
@torch.no_grad()
def test_detaching_leaves_no_trace(transformer, inputs, mode):
    next(transformer.parameters()).requires_grad_(False)  # some were frozen before
    weights = copy.deepcopy(transformer.state_dict())
    wanted_gradients = {name: p.requires_grad for name, p in transformer.named_parameters()}
    before = transformer(**inputs).sample
    attributes = {name: set(vars(module)) for name, module in transformer.named_modules()}

    patch = randomised(PromptPatch.for_transformer(transformer, mode=mode)).attach(transformer)
    transformer(**inputs)
    assert patch.detach() is patch

    assert torch.equal(transformer(**inputs).sample, before)
    assert {name: p.requires_grad for name, p in transformer.named_parameters()} == wanted_gradients
    assert transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in transformer.state_dict().items())
    for name, module in transformer.named_modules():
        assert set(vars(module)) == attributes[name]
        hooks = [value for key, value in vars(module).items() if "hooks" in key and value]
        assert hooks == [], name
    assert patch.transformer is None and PromptPatch.attached_to(transformer) is None


@pytest.mark.parametrize("mode", ["add", "prepend"])
def test_base_parameters_receive_no_gradient(transformer, inputs, mode):
    """Whatever the optimiser is given; and no weight's gradient is computed on the way."""
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
    """The leaves whose gradients a graph computes."""
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


# The losses in the output


def test_losses_join_the_output_in_training_alone(transformer, inputs):
    patch = PromptPatch.for_transformer(transformer, topk=0.5).attach(transformer).eval()
    assert list(transformer(**inputs)) == ["sample"]
    patch.train()
    output = transformer(**inputs)
    assert list(output) == ["sample", "importance_loss", "load_loss"]
    assert output.importance_loss.shape == output.load_loss.shape == ()
    assert len(transformer(**inputs, return_dict=False)) == 3
    assert type(output) is type(patch.detach() and transformer(**inputs))


def test_a_remix_dit_keeps_its_own_loss(batch):
    model = RemixDiTModel(**TINY_CONFIG).train()
    PromptPatch.for_transformer(model).attach(model).train()
    assert list(model(**batch)) == ["sample", "prior_loss", "importance_loss"]


def test_prompt_tuning_has_neither_gate_nor_losses(tiny_dit, batch):
    patch = PromptPatch.for_transformer(tiny_dit, gate="none").attach(tiny_dit).train()
    assert list(patch.state_dict()) == ["prompts"]
    assert list(tiny_dit(**batch)) == ["sample"]
    with pytest.raises(ValueError, match="patch with a `gate`, but got 'none'"):
        patch(torch.randn(1, 48))


# What a patched transformer lives through


def test_gradient_checkpointing(transformer, inputs):
    """The same gradients; also of two forward passes before one backward pass, in which blocks are computed again."""
    patch = randomised(PromptPatch.for_transformer(transformer, topk=0.5)).attach(transformer).train()
    other = inputs | {"timestep": inputs["timestep"].flip(0), "hidden_states": 2 * inputs["hidden_states"]}

    def gradients() -> list[torch.Tensor]:
        patch.zero_grad()
        torch.manual_seed(0)
        loss = sum(transformer(**each).sample.square().mean() for each in (inputs, other))
        loss.backward()
        return [parameter.grad.clone() for parameter in patch.parameters()]

    plain = gradients()
    transformer.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain)


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
    torch.testing.assert_close(gradients(model), plain)


def test_checkpointing_that_hands_blocks_other_tensors_is_refused(patched_dit, batch):
    def reentrant(module, *args):
        return torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=True)

    patched_dit.enable_gradient_checkpointing(reentrant)
    batch["hidden_states"].requires_grad_(True)
    output = patched_dit(**batch).sample
    with pytest.raises(ValueError, match="without `use_reentrant`, but got a call from elsewhere"):
        output.sum().backward()


def test_a_block_called_from_elsewhere_is_refused(patched_dit):
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(ValueError, match="patched block to be called by its transformer"):
            patched_dit.transformer_blocks[0](torch.randn(1, 16, 48), torch.randn(1, 48))


def test_checkpointing_by_others(patched_dit, batch):
    """Whatever calls a block again with the very tensor, as PyTorch's own wrapper does for FSDP."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    patch = PromptPatch.attached_to(patched_dit)
    patched_dit(**batch).sample.square().mean().backward()
    plain = patch.prompts.grad.clone()
    patch.zero_grad()
    blocks = list(patched_dit.transformer_blocks)
    apply_activation_checkpointing(patched_dit, check_fn=lambda module: module in blocks)
    patched_dit(**batch).sample.square().mean().backward()
    torch.testing.assert_close(patch.prompts.grad, plain)


def test_an_interrupted_forward_pass_does_not_spoil_the_next(patched_dit, batch):
    expected = patched_dit(**batch).sample
    patched_dit.enable_gradient_checkpointing()
    patched_dit.proj_out_2.register_forward_pre_hook(_raise_once())
    with pytest.raises(RuntimeError, match="interrupted"):
        patched_dit(**batch | {"timestep": batch["timestep"].flip(0)})
    torch.testing.assert_close(patched_dit(**batch).sample, expected)


def _raise_once():
    raised = []

    def hook(module, args):
        if not raised:
            raised.append(True)
            raise RuntimeError("interrupted")

    return hook


@torch.no_grad()
def test_deepcopy_of_a_patched_transformer(transformer, inputs):
    plain = transformer(**inputs).sample
    patch = randomised(PromptPatch.for_transformer(transformer)).attach(transformer)
    patched = transformer(**inputs).sample
    copied = copy.deepcopy(transformer)
    copied_patch = PromptPatch.attached_to(copied)
    assert copied_patch is not patch and copied_patch.transformer is copied
    assert torch.equal(copied(**inputs).sample, patched)
    copied_patch.detach()
    assert torch.equal(copied(**inputs).sample, plain)
    assert torch.equal(transformer(**inputs).sample, patched)


@pytest.mark.parametrize("order", [("patch", "model"), ("model", "patch")])
def test_deepcopy_of_both(patched_dit, order):
    both = {"model": patched_dit, "patch": PromptPatch.attached_to(patched_dit)}
    copied = copy.deepcopy({name: both[name] for name in order})
    assert PromptPatch.attached_to(copied["model"]) is copied["patch"]
    assert copied["patch"].transformer is copied["model"]
    assert copied["patch"].detach().transformer is None
    assert PromptPatch.attached_to(patched_dit) is both["patch"]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda patch: pickle.loads(pickle.dumps(patch))])
@torch.no_grad()
def test_copies_of_the_patch_alone_are_attached_to_nothing(patched_dit, batch, copied):
    patch = PromptPatch.attached_to(patched_dit)
    patched = patched_dit(**batch).sample
    other = copied(patch)
    assert other.transformer is None and patch.transformer is patched_dit
    patch.detach()
    other.attach(patched_dit)
    assert torch.equal(patched_dit(**batch).sample, patched)


@torch.no_grad()
def test_pickling_a_patched_transformer(patched_dit, batch):
    loaded = pickle.loads(pickle.dumps(patched_dit))
    assert torch.equal(loaded(**batch).sample, patched_dit(**batch).sample)
    assert PromptPatch.attached_to(loaded).transformer is loaded
    PromptPatch.attached_to(loaded).detach()


@torch.no_grad()
def test_made_in_inference_mode(batch):
    with torch.inference_mode():
        model = randomised(DiTModel(**TINY_CONFIG))
        plain = model(**batch).sample
        patch = PromptPatch.for_transformer(model).attach(model)
    assert torch.equal(model(**batch).sample, plain)
    patch.detach()
    assert torch.equal(model(**batch).sample, plain)


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
    """Compiled code does not look at hooks: attaching and detaching have it made anew."""
    tiny_dit.requires_grad_(False)  # else it would be made anew for the freezing
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


@torch.no_grad()
def test_repeated_blocks_are_compiled_once_for_all(batch):
    model = randomised(DiTModel(**TINY_CONFIG | {"num_layers": 12}))
    randomised(PromptPatch.for_transformer(model)).attach(model)
    patched = model(**batch).sample
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(model(**batch).sample, patched)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtypes(transformer, inputs, dtype):
    """Also where the patch stays in float32, as in a training on half-precision weights."""
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


def test_a_patch_follows_its_transformer(patched_dit, batch):
    """There is no second device here but `meta`, on which everything is computed but the values."""
    patched_dit.to("meta")
    output = patched_dit(**{name: value.to("meta") for name, value in batch.items()}).sample
    assert output.device.type == "meta"
    assert {parameter.device.type for parameter in PromptPatch.attached_to(patched_dit).parameters()} == {"meta"}


@torch.no_grad()
def test_weights_offloaded_layer_by_layer(patched_dit, batch):
    from accelerate import cpu_offload

    expected = patched_dit(**batch).sample
    cpu_offload(patched_dit, torch.device("cpu"))
    assert next(patched_dit.parameters()).device.type == "meta"
    for _ in range(2):
        assert torch.equal(patched_dit(**batch).sample, expected)


# Gates that are kept while sampling


def count_gatings(patch: PromptPatch) -> list:
    counted = []
    patch.register_forward_hook(lambda patch, args, output: counted.append(args))
    return counted


@torch.no_grad()
def test_gates_are_kept_by_timestep_and_label(patched_dit, batch):
    counted = count_gatings(PromptPatch.attached_to(patched_dit))
    first = patched_dit(**batch).sample
    assert torch.equal(patched_dit(**{name: value.clone() for name, value in batch.items()}).sample, first)
    assert len(counted) == 1
    for change in ({"timestep": torch.tensor([3, 250, 600, 998])}, {"class_labels": torch.tensor([0, 4, 9, 9])},
                   {"force_drop_ids": torch.tensor([True, False, False, False])}):  # fmt: skip
        patched_dit(**batch | change)
        patched_dit(**batch | change)
    assert len(counted) == 4


@torch.no_grad()
def test_kept_gates_are_forgotten_when_weights_change(patched_dit, batch):
    patch = PromptPatch.attached_to(patched_dit)

    def expected() -> torch.Tensor:
        return copy.deepcopy(patched_dit)(**batch).sample  # copies keep nothing

    patched_dit(**batch)
    patch.gate_proj.weight.add_(0.1)
    assert torch.equal(patched_dit(**batch).sample, expected())
    patched_dit.time_label_embed.class_embedder.weight.add_(0.1)
    assert torch.equal(patched_dit(**batch).sample, expected())
    patch.load_state_dict({name: 2 * value for name, value in patch.state_dict().items()})
    assert torch.equal(patched_dit(**batch).sample, expected())
    patch.gate_proj.weight.data.add_(0.1)  # which PyTorch does not count
    patch.eval()
    assert torch.equal(patched_dit(**batch).sample, expected())


def test_gates_are_not_kept_in_training(patched_dit, batch):
    patch = PromptPatch.attached_to(patched_dit)
    counted = count_gatings(patch)
    for _ in range(2):
        patched_dit(**batch).sample.sum().backward()  # in eval mode, with gradients
    patch.train()
    with torch.no_grad():
        patched_dit(**batch)
        patched_dit(**batch)
    assert len(counted) == 4


@torch.no_grad()
def test_kept_gates_are_bounded_in_bytes(patched_dit, batch, monkeypatch):
    monkeypatch.setattr("diffusers_dmp.plugins.gate_cache.MAX_KEPT_BYTES", 10 * 2 * 4 * 16 * 4)  # ten of (L, B, M)
    counted = count_gatings(PromptPatch.attached_to(patched_dit))
    for timestep in [*range(12), 11, 2, 1]:
        patched_dit(**batch | {"timestep": torch.tensor(timestep)})
    assert len(counted) == 13  # 0 and 1 had gone, 2 to 11 were there


@torch.no_grad()
def test_gates_are_kept_for_what_they_were_made_of(patched_dit, batch):
    counted = count_gatings(PromptPatch.attached_to(patched_dit))
    plain = patched_dit(**batch).sample
    with torch.autocast("cpu", torch.bfloat16):
        patched_dit(**batch)
    assert torch.equal(patched_dit(**batch).sample, plain)
    assert len(counted) == 3  # the precision is another one
    patched_dit.train()  # labels are dropped at random
    patched_dit(**batch)
    patched_dit(**batch)
    assert len(counted) == 5


def test_gate_weights(patched_dit):
    patch = PromptPatch.attached_to(patched_dit)
    timesteps = torch.tensor([0, 500, 999])
    gates = patch.gate_weights(timesteps, class_labels=torch.tensor([3]))
    conditioning = patched_dit.time_label_embed(timesteps, torch.tensor([3, 3, 3]))
    expected = gates_of(conditioning, patch.gate_proj.weight, patch.gate_proj.bias, depth=2)
    torch.testing.assert_close(gates, expected.transpose(0, 1).detach(), atol=1e-5, rtol=1e-4)
    again = patch.gate_weights(torch.tensor([500, 500, 999]), class_labels=torch.tensor([3]))
    assert torch.equal(again, gates[[1, 1, 2]])
    # whatever the mode, and whether compiled or not
    patched_dit.train(), patched_dit.transformer_blocks[1].eval(), patch.train()
    patched_dit.compile_repeated_blocks(backend="aot_eager")
    assert torch.equal(patch.gate_weights(timesteps, class_labels=torch.tensor([3])), gates)
    assert patched_dit.training and not patched_dit.transformer_blocks[1].training and patch.training
    patch.detach()
    with pytest.raises(ValueError, match="attached to a transformer"):
        patch.gate_weights(timesteps)


# In pipelines and folders


@pytest.fixture
def pipeline(patched_dit) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(patched_dit, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: DiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], guidance_scale=1.5, num_inference_steps=3, output_type="pt", generator=generator).images


def test_round_trip(tmp_path):
    patch = randomised(PromptPatch(48, 16, 2, topk=0.5, base_model_name_or_path="facebook/DiT-XL-2-256"))
    patch.save_pretrained(tmp_path)
    loaded = PromptPatch.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in patch.config.items() if not name.startswith("_"))
    assert all(torch.equal(value, patch.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_the_pipeline_keeps_its_patch(pipeline, tmp_path):
    """Attached by hand after the pipeline was made, as the fixture has it."""
    images = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "patched")
    saved = {path.parent.name for path in (tmp_path / "patched").glob("*/*.safetensors")}
    assert saved == {"transformer", "prompt_patch"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "patched")
    assert loaded.prompt_patch.transformer is loaded.transformer
    assert torch.equal(draw(loaded), images)
    assert torch.equal(draw(ClassConditionalPipeline(**loaded.components)), images)
    assert torch.equal(draw(copy.deepcopy(loaded)), images)

    loaded.prompt_patch.detach()
    plain = draw(loaded)
    assert not torch.equal(plain, images)
    assert loaded.prompt_patch is None and loaded.components["prompt_patch"] is None
    assert torch.equal(draw(ClassConditionalPipeline.from_pretrained(tmp_path / "patched", prompt_patch=None)), plain)
    loaded.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "prompt_patch").exists()
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "plain")), plain)


def test_a_patch_given_to_a_pipeline_is_put_into_eval_mode(tiny_dit):
    pipeline = ClassConditionalPipeline(tiny_dit, DDIMScheduler(), prompt_patch=PromptPatch(48, 16, 2))
    assert PromptPatch.attached_to(tiny_dit) is pipeline.prompt_patch and not pipeline.prompt_patch.training


@pytest.mark.slow
def test_the_pipeline_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    torch.save(draw(pipeline), tmp_path / "images.pt")
    script = f"""
import torch
from diffusers import DiffusionPipeline
import diffusers_dmp
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
generator = torch.Generator().manual_seed(0)
images = pipeline([1, 2], guidance_scale=1.5, num_inference_steps=3, output_type="pt", generator=generator).images
assert torch.equal(images, torch.load({str(tmp_path / "images.pt")!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("offload", ["models", pytest.param("groups", marks=pytest.mark.group_offload)])
def test_the_patch_of_an_offloaded_pipeline_stays(pipeline, tmp_path, offload):
    """Its layers are not called as such, so that nothing would bring them back."""
    images = draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if offload == "models":
        loaded.enable_model_cpu_offload(device="cpu")
        assert hasattr(loaded.transformer, "_hf_hook")
    else:
        loaded.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        assert hasattr(loaded.transformer.proj_out_2, "_diffusers_hook")
    for module in loaded.prompt_patch.modules():
        assert not hasattr(module, "_hf_hook") and not hasattr(module, "_diffusers_hook")
    torch.testing.assert_close(draw(loaded), images)
    loaded.prompt_patch.detach()
    assert (draw(loaded) - images).abs().max() > 1e-3


def test_the_pipeline_in_half_precision(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.prompt_patch.dtype == loaded.transformer.dtype == torch.bfloat16
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(loaded).float(), draw(pipeline), atol=0.1, rtol=0)


def test_a_foreign_pipeline_saves_the_untouched_base(tmp_path):
    """Its own constructor knows no patch: the patch goes to a folder of its own."""
    from diffusers import AutoencoderKL

    config = SIZES | {"num_embeds_ada_norm": 1000, "out_channels": 4}
    transformer = randomised(DiTTransformer2DModel(**config))
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,), norm_num_groups=8)
    pipeline = DiTPipeline(transformer, vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline([1], num_inference_steps=2, output_type="np", generator=generator).images

    plain = images(pipeline)
    patch = randomised(PromptPatch.for_transformer(pipeline.transformer)).attach(pipeline.transformer)
    patched = images(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline")
    patch.save_pretrained(tmp_path / "patch")

    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert (images(loaded) == plain).all()
    PromptPatch.from_pretrained(tmp_path / "patch").attach(loaded.transformer)
    assert (images(loaded) == patched).all()
    assert not (patched == plain).all()


# Other transformers


class Mixer(nn.Module):
    """A transformer that patches do not know: blocks called by keyword, tokens second, embedded by timestep alone."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, temb, tokens):
            return tokens + self.linear(tokens + temb[:, None])

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([self.Block() for _ in range(3)])

    def forward(self, sample, timestep, return_dict=True):
        temb = self.embed(timestep[:, None].float())
        for layer in self.layers:
            sample = layer(temb, tokens=sample)
        return (self.head(sample),)


@pytest.fixture
def mixer_layout(monkeypatch) -> TransformerLayout:
    monkeypatch.setattr(layouts, "_LAYOUTS", dict(layouts._LAYOUTS))
    return TransformerLayout(
        blocks="layers",
        image_tokens="tokens",
        conditioning=Conditioning(embedder="embed"),
        depends_on=("timestep",),
        width=lambda model: 8,
        num_tokens=lambda model: 5,
    )


def test_another_transformer_can_be_taught(mixer_layout):
    register_layout(Mixer, mixer_layout)
    model = randomised(Mixer())
    sample, timestep = torch.randn(2, 5, 8), torch.tensor([0.1, 0.7])
    with torch.no_grad():
        plain = model(sample, timestep)[0]
        patch = PromptPatch.for_transformer(model).attach(model)
        assert torch.equal(model(sample, timestep)[0], plain)
        randomised(patch)
        assert not torch.allclose(model(sample, timestep)[0], plain)
    patch.train()
    output, importance_loss = model(sample, timestep)
    (output.sum() + importance_loss).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_taught_transformer_that_hands_its_input_to_its_blocks(mixer_layout):
    """The same tensor at another timestep, as the first block's input, gets that timestep's gates."""
    register_layout(Mixer, mixer_layout)
    model = randomised(Mixer())
    randomised(PromptPatch.for_transformer(model)).attach(model)
    sample = torch.randn(2, 5, 8)
    model(sample, torch.tensor([0.1, 0.7]))
    output = model(sample, torch.tensor([0.9, 0.2]))[0]
    assert torch.equal(output, model(sample.clone(), torch.tensor([0.9, 0.2]))[0])


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "levels"}, "modules that it has, but got 'levels'"),
        (
            {"conditioning": Conditioning(embedder="embed", after="pos_embed")},
            "modules that it has, but got 'pos_embed'",
        ),
        (
            {"image_tokens": "hidden_states"},
            "`image_tokens` to name arguments of Block's `forward`, temb, tokens, but",
        ),
        ({"depends_on": ("t",)}, "`depends_on` to name arguments of Mixer's `forward`, sample, timestep, .*'t'"),
    ],
)
def test_a_layout_that_does_not_fit_leaves_the_transformer_alone(mixer_layout, change, message):
    model = Mixer()
    register_layout(Mixer, dataclasses.replace(mixer_layout, **change))
    with pytest.raises(ValueError, match=message):
        PromptPatch(8, 5, 3).attach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_transformer_that_returns_neither_dataclass_nor_tuple(mixer_layout, monkeypatch):
    register_layout(Mixer, mixer_layout)
    forward = Mixer.forward
    monkeypatch.setattr(Mixer, "forward", lambda self, sample, timestep: forward(self, sample, timestep)[0])
    model = Mixer()
    PromptPatch.for_transformer(model).attach(model)
    with pytest.raises(ValueError, match="return a BaseOutput or a tuple, but got a Tensor"):
        model(torch.randn(2, 5, 8), torch.tensor([0.1, 0.7]))


def test_an_unknown_transformer(mixer_layout):
    patch = PromptPatch(8, 5, 3)
    with pytest.raises(ValueError, match="one of DiTModel, .* but got a Mixer; .*register_layout.* teaches"):
        patch.attach(Mixer())


def test_prepending_to_a_model_that_takes_no_extra_tokens(mixer_layout):
    register_layout(Mixer, mixer_layout)
    with pytest.raises(ValueError, match="extra tokens to prepend to, but got a Mixer"):
        PromptPatch(8, 5, 3, mode="prepend").attach(Mixer())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 16, 2), "`hidden_size` to be the 48 channels of the DiTModel, but got 32"),
        ((48, 64, 2), "`num_prompts` to be the 16 image tokens of the DiTModel, but got 64"),
        ((48, 16, 3), "`depth` to be at most the 2 blocks of the DiTModel, but got 3"),
    ],
)
def test_a_patch_that_does_not_fit(tiny_dit, sizes, message):
    with pytest.raises(ValueError, match=message):
        PromptPatch(*sizes).attach(tiny_dit)
    assert PromptPatch.attached_to(tiny_dit) is None
    assert all(parameter.requires_grad for parameter in tiny_dit.parameters())


def test_patches_do_not_stack(patched_dit):
    with pytest.raises(ValueError, match="DiTModel without a patch, but got one that has one"):
        PromptPatch.for_transformer(patched_dit).attach(patched_dit)


def test_a_patch_is_attached_once(patched_dit):
    with pytest.raises(ValueError, match="attached to nothing, but got one on a DiTModel"):
        PromptPatch.attached_to(patched_dit).attach(DiTModel(**TINY_CONFIG))
    with pytest.raises(ValueError, match="attached to a transformer, but got one that is not"):
        PromptPatch(48, 16, 2).detach()


def test_a_pipeline_refuses_a_second_patch(patched_dit):
    with pytest.raises(ValueError, match="without a patch"):
        ClassConditionalPipeline(patched_dit, DDIMScheduler(), prompt_patch=PromptPatch(48, 16, 2))


def test_an_image_of_another_size(patched_dit):
    with pytest.raises(ValueError, match="image of the 16 tokens that the patch has prompts for, but got 64"):
        patched_dit(torch.randn(1, 4, 16, 16), 5)


@torch.no_grad()
def test_prepended_prompts_take_any_size(tiny_dit):
    randomised(PromptPatch.for_transformer(tiny_dit, num_prompts=3, mode="prepend")).attach(tiny_dit)
    assert tiny_dit(torch.randn(1, 4, 16, 16), 5).sample.shape == (1, 8, 16, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"topk": 0.0}, r"`topk` to be in \(0, 1\] and to keep one of 16 prompts, but got 0.0"),
        ({"topk": 1.5}, r"`topk` to be in \(0, 1\].* but got 1.5"),
        ({"topk": 0.01}, "keep one of 16 prompts, but got 0.01"),
        ({"mode": "replace"}, "`mode` to be one of add, prepend, but got 'replace'"),
        ({"gate": "mlp"}, "`gate` to be one of linear, none, but got 'mlp'"),
        ({"depth": 0}, "`depth` to be at least 1, but got 0"),
        ({"num_prompts": 1}, "`num_prompts` to be at least 2"),
    ],
)
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        PromptPatch(**{"hidden_size": 48, "num_prompts": 16, "depth": 2} | config)
