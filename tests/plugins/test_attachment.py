"""Attached prompts survive what happens to their transformer, and detaching leaves no trace."""

import copy
import pickle

import pytest
import torch
from conftest import TINY_CONFIG, randomised
from diffusers import DDIMScheduler

from diffusers_dmp import ClassConditionalPipeline, DiTModel, PromptPatch

pytest_plugins = ["prompted_fixtures"]


@pytest.mark.parametrize("mode", ["add", "prepend"])
@torch.no_grad()
def test_detaching_leaves_no_trace(transformer, inputs, mode):
    next(transformer.parameters()).requires_grad_(False)  # some were frozen before
    weights = copy.deepcopy(transformer.state_dict())
    required_gradients = {name: p.requires_grad for name, p in transformer.named_parameters()}
    before = transformer(**inputs).sample
    attributes = {name: set(vars(module)) for name, module in transformer.named_modules()}

    patch = randomised(PromptPatch.for_transformer(transformer, mode=mode)).attach(transformer)
    transformer(**inputs)
    assert patch.detach() is patch

    assert torch.equal(transformer(**inputs).sample, before)
    assert {name: p.requires_grad for name, p in transformer.named_parameters()} == required_gradients
    assert transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in transformer.state_dict().items())
    for name, module in transformer.named_modules():
        assert set(vars(module)) == attributes[name]
        hooks = [value for key, value in vars(module).items() if "hooks" in key and value]
        assert hooks == [], name
    assert patch.transformer is None and PromptPatch.attached_to(transformer) is None


# Gradient checkpointing


def test_gradient_checkpointing(transformer, inputs):
    """Gradients stay the same, also with two forward passes before the backward pass, which computes blocks again."""
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
        with context, pytest.raises(ValueError, match="block with prompts to be called by its transformer"):
            patched_dit.transformer_blocks[0](torch.randn(1, 16, 48), torch.randn(1, 48))


def test_checkpointing_by_others(patched_dit, batch):
    """Others may call a block again with the same tensor, as PyTorch's own wrapper for FSDP does."""
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


# Copies


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
    assert not any("forward" in vars(module) for module in copied.modules())
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
def test_copies_of_the_prompts_alone_are_attached_to_nothing(patched_dit, batch, copied):
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
    assert not any("forward" in vars(module) for module in loaded.modules())


# Devices


@torch.no_grad()
def test_made_in_inference_mode(batch):
    with torch.inference_mode():
        model = randomised(DiTModel(**TINY_CONFIG))
        plain = model(**batch).sample
        patch = PromptPatch.for_transformer(model).attach(model)
    torch.testing.assert_close(model(**batch).sample, plain)
    patch.detach()
    torch.testing.assert_close(model(**batch).sample, plain)


def test_prompts_move_with_their_transformer(patched_dit, batch):
    """The only second device of every machine is `meta`, which computes everything but the values."""
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
        torch.testing.assert_close(patched_dit(**batch).sample, expected)


# Refused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 16, 2), "`hidden_size` to be the 48 channels of the DiTModel, but got 32"),
        ((48, 64, 2), "`num_prompts` to be the 16 image tokens of the DiTModel, but got 64"),
        ((48, 16, 3), "`depth` to be at most the 2 blocks of the DiTModel, but got 3"),
    ],
)
def test_prompts_that_do_not_fit(tiny_dit, sizes, message):
    with pytest.raises(ValueError, match=message):
        PromptPatch(*sizes).attach(tiny_dit)
    assert PromptPatch.attached_to(tiny_dit) is None
    assert all(parameter.requires_grad for parameter in tiny_dit.parameters())


def test_prompts_do_not_stack(patched_dit):
    with pytest.raises(ValueError, match="DiTModel without prompts, but got one that has some"):
        PromptPatch.for_transformer(patched_dit).attach(patched_dit)


def test_prompts_are_attached_once(patched_dit):
    with pytest.raises(ValueError, match="attached to nothing, but got some on a DiTModel"):
        PromptPatch.attached_to(patched_dit).attach(DiTModel(**TINY_CONFIG))
    with pytest.raises(ValueError, match="attached to a transformer, but got some that are not"):
        PromptPatch(48, 16, 2).detach()


def test_a_pipeline_refuses_other_prompts(patched_dit):
    with pytest.raises(ValueError, match="without prompts"):
        ClassConditionalPipeline(patched_dit, DDIMScheduler(), prompt_patch=PromptPatch(48, 16, 2))


def test_an_image_of_another_size(patched_dit):
    with pytest.raises(ValueError, match="image of 16 tokens, one for each prompt of a block, but got 64"):
        patched_dit(torch.randn(1, 4, 16, 16), 5)
