"""What happens to a denoiser while a LoRA per interval is attached: copies, offloading, compilation, changes by the user."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import TINY_CONFIG, randomised
from loras import activate, adapters_in_use, add_loras, gradients, inputs_of, output_of, with_only
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import set_requires_grad
from tiny_pipelines import RECIPES, randn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from diffusers_dmp import DiTModel, LoraExperts, NoiseIntervals, PromptPatch

THREE = NoiseIntervals.from_timesteps([500, 800])
HIGH, MIDDLE, LOW = [900.0, 950.0], [600.0, 700.0], [100.0, 200.0]
EXPERTS = (["low", None, "high"], THREE)
ACTIVE = ((LOW, [("low", 1.0)]), (MIDDLE, []), (HIGH, [("high", 1.0)]), (LOW, [("low", 1.0)]))


@pytest.fixture
def denoiser():
    return activate(add_loras(RECIPES["flux"].denoiser(), ["low", "high"]), [("low", 1.0)])


CPU = torch.device("cpu")
PREPARATIONS = {
    "model offload": lambda denoiser: cpu_offload_with_hook(denoiser, CPU),
    "sequential offload": lambda denoiser: cpu_offload(denoiser, CPU),
    "group offload": lambda denoiser: denoiser.enable_group_offload(CPU, CPU, "block_level", 1),
    "leaf offload": lambda denoiser: denoiser.enable_group_offload(CPU, CPU, "leaf_level"),
    "layerwise casting": lambda denoiser: denoiser.enable_layerwise_casting(torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "preparation",
    [
        pytest.param(name, marks=[pytest.mark.group_offload] if name in ("group offload", "leaf offload") else [])
        for name in PREPARATIONS
    ],
)
@torch.no_grad()
def test_a_prepared_denoiser(denoiser, preparation, order):
    prepare = PREPARATIONS[preparation]
    by_hand = copy.deepcopy(denoiser)
    prepare(by_hand)
    if order == "before":
        prepare(denoiser)
    experts = LoraExperts(*EXPERTS).attach(denoiser)
    if order == "after":
        prepare(denoiser)

    outputs = {}
    for timesteps, adapters in ACTIVE:
        inputs = inputs_of("flux", timesteps)
        outputs[timesteps[0]] = output_of(denoiser, inputs)
        assert torch.equal(outputs[timesteps[0]], output_of(activate(by_hand, adapters), inputs))
    mixed = output_of(denoiser, inputs_of("flux", [900.0, 700.0]))
    torch.testing.assert_close(mixed, torch.stack([outputs[900.0][0], outputs[600.0][1]]))
    experts.detach()
    assert torch.equal(output_of(denoiser, inputs), output_of(activate(by_hand, [("low", 1.0)]), inputs))


@torch.no_grad()
def test_compiled_once_for_each_expert():
    denoiser = add_loras(RECIPES["wan"].denoiser(), ["low", "high"])
    by_hand = copy.deepcopy(denoiser)
    compiled = CompileCounter()
    denoiser.compile_repeated_blocks(backend=compiled, fullgraph=True)
    LoraExperts(*EXPERTS).attach(denoiser)
    counts = []
    for timesteps, adapters in (*ACTIVE, *ACTIVE):
        inputs = inputs_of("wan", timesteps)
        output = output_of(denoiser, inputs)
        torch.testing.assert_close(output, output_of(activate(by_hand, adapters), inputs))
        counts.append(compiled.frame_count)
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3]


# Copies


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda denoiser: pickle.loads(pickle.dumps(denoiser))])
@torch.no_grad()
def test_a_copy_has_experts_of_its_own(denoiser, duplicate):
    experts = LoraExperts(*EXPERTS).attach(denoiser)
    expected = output_of(denoiser, inputs_of("flux", HIGH))
    twin = duplicate(denoiser)

    assert LoraExperts.attached_to(denoiser) is experts
    others = LoraExperts.attached_to(twin)
    assert others is not experts and (others.adapters, others.intervals) == (experts.adapters, experts.intervals)
    output_of(denoiser, inputs_of("flux", LOW))  # which does not switch the copy's layers
    assert torch.equal(output_of(twin, inputs_of("flux", HIGH)), expected)
    experts.detach()
    assert torch.equal(output_of(twin, inputs_of("flux", HIGH)), expected)
    others.detach()
    assert LoraExperts.attached_to(twin) is None


def test_a_copy_of_the_experts_is_attached_to_nothing(denoiser):
    experts = LoraExperts(*EXPERTS).attach(denoiser)
    copy.deepcopy(experts).attach(add_loras(RECIPES["flux"].denoiser(), ["low", "high"]))


# Training


def test_two_training_steps(denoiser):
    """As if each owner were trained on its own samples, and the others stay as they are."""
    LoraExperts(*EXPERTS).attach(denoiser)
    alone = {name: with_only("flux", [(name, 1.0)]) for name in ("low", "high")}
    batches = [inputs_of("flux", [900.0, 100.0]), inputs_of("flux", [950.0, 200.0])]

    def train(model, samples):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for batch in batches:
            output_of(model, batch)[samples].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    together = train(denoiser, [0, 1])
    for name, sample in (("high", 0), ("low", 1)):
        for parameter, value in train(alone[name], [sample]).items():
            torch.testing.assert_close(together[parameter], value)


def test_frozen_adapters_are_named_in_training(denoiser, caplog):
    """PEFT freezes all adapters but the last one added."""
    LoraExperts(*EXPERTS).attach(denoiser.train())
    set_requires_grad(denoiser, "low", False)
    with torch.no_grad():
        output_of(denoiser, inputs_of("flux", [900.0, 100.0]))
    assert not caplog.records
    for _ in range(2):
        output_of(denoiser, inputs_of("flux", [900.0, 100.0]))
    (record,) = caplog.records
    assert record.getMessage().startswith("low of the FluxTransformer2DModel requires no gradients")


def test_blocks_that_are_checkpointed_by_pytorch(denoiser):
    def gradients_of_high():
        denoiser.zero_grad()
        loss = output_of(denoiser, inputs_of("flux", HIGH)).square().sum()
        output_of(denoiser, inputs_of("flux", LOW))
        loss.backward()
        return {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(denoiser).items()}

    LoraExperts(*EXPERTS).attach(denoiser)
    plain = gradients_of_high()
    apply_activation_checkpointing(denoiser, check_fn=lambda module: module in denoiser.single_transformer_blocks)
    torch.testing.assert_close(gradients_of_high(), plain)


def test_a_backward_pass_after_detaching(denoiser):
    denoiser.enable_gradient_checkpointing()
    experts = LoraExperts(*EXPERTS).attach(activate(denoiser, [("low", 0.5)]))
    loss = output_of(denoiser, inputs_of("flux", HIGH)).square().sum()
    experts.detach()
    loss.backward()
    assert gradients(denoiser) and all(".high." in name for name in gradients(denoiser))
    assert {tuple(names) for names, _ in adapters_in_use(denoiser)} == {("low",)}


def test_a_backward_pass_after_others_are_attached(denoiser):
    denoiser.enable_gradient_checkpointing()
    experts = LoraExperts(*EXPERTS).attach(denoiser)
    loss = output_of(denoiser, inputs_of("flux", HIGH)).square().sum()
    experts.detach()
    LoraExperts(["high", None, ("low", 0.5)], THREE).attach(denoiser)
    expected = output_of(denoiser, inputs_of("flux", HIGH))
    loss.backward()
    assert gradients(denoiser) and all(".high." in name for name in gradients(denoiser))
    assert torch.equal(output_of(denoiser, inputs_of("flux", HIGH)), expected)


# Other plugins


@pytest.mark.parametrize("first", ["prompts", "experts"])
@torch.no_grad()
def test_prompts_see_passes_of_one_expert(first):
    denoiser = randomised(DiTModel(**TINY_CONFIG)).eval()
    for name in ("low", "high"):
        config = LoraConfig(r=2, target_modules=["to_qkv", "linear_1"], init_lora_weights=False)
        inject_adapter_in_model(config, denoiser, name)
    batch_sizes: list[int] = []
    denoiser.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    plugins = [
        randomised(PromptPatch.for_transformer(denoiser)),
        LoraExperts(["low", "high"], NoiseIntervals((0, 500, 1000))),
    ]
    for plugin in plugins if first == "prompts" else plugins[::-1]:
        plugin.attach(denoiser)
    x, labels = randn(2, 4, 8, 8), torch.tensor([1, 2])
    mixed = denoiser(x, torch.tensor([900, 100]), labels).sample
    assert batch_sizes == [1, 1]
    for sample, t in enumerate((900, 100)):
        alone = denoiser(x, torch.tensor([t, t]), labels).sample[sample]
        torch.testing.assert_close(mixed[sample], alone)


# Changes of the adapters meanwhile


def load_again(denoiser):
    denoiser.delete_adapters("high")
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "high")


CHANGES = {
    "set_adapters": lambda denoiser: denoiser.set_adapters(["low"], [0.5]),
    "set_adapter": lambda denoiser: denoiser.set_adapter("high"),
    "delete_adapters": lambda denoiser: denoiser.delete_adapters("high"),
    "load again": load_again,
    "load another": lambda denoiser: denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "another"),
    "set_scale": lambda denoiser: denoiser.transformer_blocks[0].attn.to_q.set_scale("high", 2.0),
    "fuse_lora": lambda denoiser: denoiser.fuse_lora(),
    "fuse_lora of another": lambda denoiser: denoiser.fuse_lora(adapter_names=["high"]),
    "unload_lora": lambda denoiser: denoiser.unload_lora(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_of_the_adapters_are_refused(change):
    denoiser = RECIPES["sd3"].denoiser()
    for name in ("low", "high"):
        denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    experts = LoraExperts(*EXPERTS).attach(denoiser)
    inputs = inputs_of("sd3", LOW)
    output_of(denoiser, inputs)
    CHANGES[change](denoiser)
    with pytest.raises(ValueError, match="stay as they were"):
        output_of(denoiser, inputs)
    experts.detach()
    output_of(denoiser, inputs)
    if change == "set_adapters":  # what the user has set stays
        assert adapters_in_use(denoiser)[0] == (["low"], {"low": 0.5 * 4, "high": 4.0})


def test_switching_all_adapters_off_and_on(denoiser):
    """`disable_lora` compares with and without LoRA."""
    LoraExperts(*EXPERTS).attach(denoiser)
    inputs = inputs_of("flux", HIGH)
    expected = output_of(denoiser, inputs)
    denoiser.disable_lora()
    assert torch.equal(output_of(denoiser, inputs), output_of(RECIPES["flux"].denoiser(), inputs))
    denoiser.enable_lora()
    assert torch.equal(output_of(denoiser, inputs), expected)
